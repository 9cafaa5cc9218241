// The one line that belongs to a failure, kept for each thread.

#include <cstdarg>
#include <cstdio>

#include "abi.h"
#include "kernels.h"

namespace {

thread_local char line[1024] = "";

}  // namespace

namespace qlm {

int fail(int status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace qlm

const char *qlm_error(void) { return line; }

int32_t qlm_abi_version(void) { return QLM_ABI_VERSION; }
