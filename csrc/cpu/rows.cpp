#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace ebdiff {

static const Rows& widest() {
#ifdef __x86_64__
  const char* asked = std::getenv("EBDIFF_ISA");  // for tests: a narrower one
  const std::string_view limit = asked ? asked : "avx512";
  const auto has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const auto has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return rows_avx512();
  if (has_avx2 && limit != "base") return rows_avx2();
#endif
  return rows_base();
}

const Rows& rows() {
  static const Rows& chosen = widest();
  return chosen;
}

}  // namespace ebdiff
