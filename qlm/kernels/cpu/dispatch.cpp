// Which instruction sets there are, which of them this machine can run, and which one is used. Environment variables are
// read by the caller, not here.

#include <atomic>
#include <cstddef>
#include <cstring>
#include <string>

#include "abi.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

struct Features {
  bool avx2 = false, avxvnni = false, avx512vnni = false, avx512bf16 = false;
};

#if defined(__x86_64__)

bool bit(uint32_t word, int number) { return (word >> number & 1) != 0; }

// What the CPU can do and the operating system saves at a task switch: Intel SDM volume 1, sections 14.3 (AVX), 15.2
// (AVX-512) and volume 2, CPUID, leaves 1 and 7.
Features detect() {
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return {};
  const bool fma = bit(c, 12), xsave_enabled = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!xsave_enabled || !avx) return {};
  uint32_t states, high;
  __asm__("xgetbv" : "=a"(states), "=d"(high) : "c"(0));
  const bool ymm = (states & 0x06) == 0x06;  // SSE and AVX state
  const bool zmm = (states & 0xe6) == 0xe6;  // and masks, upper halves, upper registers
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return {};
  const bool avx512 = bit(b, 16) /* F */ && bit(b, 17) /* DQ */ && bit(b, 30) /* BW */ && bit(b, 31) /* VL */;
  Features found;
  found.avx2 = ymm && bit(b, 5) && fma && f16c;
  found.avx512vnni = zmm && found.avx2 && avx512 && bit(c, 11);
  const uint32_t subleaves = a;
  const bool has_more = subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0;
  found.avx512bf16 = has_more && found.avx512vnni && bit(a, 5);
#if defined(QLM_TEST_AVXVNNI_EVEX)
  found.avxvnni = found.avx512vnni;
#else
  found.avxvnni = has_more && found.avx2 && bit(a, 4);
#endif
  return found;
}

#else

Features detect() { return {}; }

#endif

struct Entry {
  const qlm::Kernels *kernels;
  const char *name;
  bool (*runs_here)(const Features &);
};

// Best last; ends with an empty entry.
const Entry entries[] = {
#if defined(QLM_HAVE_SCALAR)
    {&qlm::scalar::kernels, "scalar", [](const Features &) { return true; }},
#endif
#if defined(QLM_HAVE_AVX2)
    {&qlm::avx2::kernels, "avx2", [](const Features &features) { return features.avx2; }},
#endif
#if defined(QLM_HAVE_AVXVNNI)
    {&qlm::avxvnni::kernels, "avxvnni", [](const Features &features) { return features.avxvnni; }},
#endif
#if defined(QLM_HAVE_AVX512VNNI)
    {&qlm::avx512vnni::kernels, "avx512vnni", [](const Features &features) { return features.avx512vnni; }},
#endif
    {nullptr, "", nullptr},
};

const Features &features() {
  static const Features found = detect();
  return found;
}

const Entry &best() {
  const Entry *found = entries;
  for (const Entry *entry = entries; entry->kernels != nullptr; ++entry)
    if (entry->runs_here(features())) found = entry;
  return *found;
}

std::string names(bool only_supported) {
  std::string list;
  for (const Entry *entry = entries; entry->kernels != nullptr; ++entry)
    if (!only_supported || entry->runs_here(features())) list += (list.empty() ? "" : ",") + std::string(entry->name);
  return list;
}

std::atomic<const Entry *> chosen{nullptr};

const Entry &current() {
  const Entry *entry = chosen.load(std::memory_order_acquire);
  if (entry == nullptr) chosen.store(entry = &best(), std::memory_order_release);
  return *entry;
}

}  // namespace

namespace qlm {

const Kernels &selected() { return *current().kernels; }

bool has_avx512_bf16() { return features().avx512bf16 && std::strcmp(current().name, "avx512vnni") == 0; }

}  // namespace qlm

const char *qlm_isa_compiled(void) {
  static const std::string list = names(false);
  return list.c_str();
}

const char *qlm_isa_supported(void) {
  static const std::string list = names(true);
  return list.c_str();
}

const char *qlm_isa_selected(void) { return current().name; }

int qlm_isa_select(const char *name) {
  if (name == nullptr || *name == '\0') {
    chosen.store(&best(), std::memory_order_release);
    return QLM_OK;
  }
  for (const Entry *entry = entries; entry->kernels != nullptr; ++entry) {
    if (std::strcmp(entry->name, name) != 0) continue;
    if (!entry->runs_here(features()))
      return qlm::fail(QLM_BAD_ARGUMENT, "instruction set %s: this machine cannot run it; it can run %s", name,
                       qlm_isa_supported());
    chosen.store(entry, std::memory_order_release);
    return QLM_OK;
  }
  return qlm::fail(QLM_BAD_ARGUMENT, "instruction set %.64s: not one of %s", name, qlm_isa_compiled());
}

int64_t qlm_struct_size(const char *name) {
  if (std::strcmp(name, "qlm_linear") == 0) return sizeof(qlm_linear);
  if (std::strcmp(name, "qlm_norm") == 0) return sizeof(qlm_norm);
  if (std::strcmp(name, "qlm_block") == 0) return sizeof(qlm_block);
  if (std::strcmp(name, "qlm_model") == 0) return sizeof(qlm_model);
  return -1;
}
