// The C++ tests of the CPU kernels, in one program that AddressSanitizer and UndefinedBehaviorSanitizer watch.
//
//   kernels_test [test...]    all tests, or those named; exit status 0 if nothing was wrong

#include <chrono>
#include <string>

#include "abi.h"
#include "check.h"
#include "tests.h"

std::vector<const char *> instruction_sets() {
  static const std::string list = qlm_isa_supported();
  static std::vector<std::string> names;
  if (names.empty()) {
    size_t start = 0;
    for (size_t comma; (comma = list.find(',', start)) != std::string::npos; start = comma + 1)
      names.push_back(list.substr(start, comma - start));
    names.push_back(list.substr(start));
  }
  std::vector<const char *> result;
  for (const std::string &name : names) result.push_back(name.c_str());
  return result;
}

int main(int count, char **arguments) {
  const struct {
    const char *name;
    void (*run)();
  } tests[] = {{"team", test_team},
               {"mapping", test_mapping},
               {"linear", test_linear},
               {"parts", test_parts},
               {"decoder", test_decoder}};
  int known = 0;
  for (const auto &test : tests) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(arguments[i], test.name) == 0;
    if (!wanted) continue;
    ++known;
    const auto start = std::chrono::steady_clock::now();
    test.run();
    std::printf("%s: passed in %.1f s\n", test.name,
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    std::fflush(stdout);
  }
  CHECK(known == (count == 1 ? 5 : count - 1), "no such test");
  std::printf("instruction sets: %s\n", qlm_isa_supported());
  return 0;
}
