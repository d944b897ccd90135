#include <cstdlib>
#include <string_view>

#include "kernels.h"
#include "loss_rows.h"
#include "norm_rows.h"

namespace ebdiff {

enum class Isa { base, avx2, avx512 };

static Isa widest() {
#ifdef __x86_64__
  const char* asked = std::getenv("EBDIFF_ISA");  // for tests: a narrower one
  const std::string_view limit = asked ? asked : "avx512";
  const auto has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const auto has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && limit == "avx512") return Isa::avx512;
  if (has_avx2 && limit != "base") return Isa::avx2;
#endif
  return Isa::base;
}

template <class Table>
static const Table& choose(const Table& (*base)(), [[maybe_unused]] const Table& (*avx2)(),
                           [[maybe_unused]] const Table& (*avx512)()) {
  const Isa isa = widest();
  return isa == Isa::avx512 ? avx512() : isa == Isa::avx2 ? avx2() : base();
}

#ifdef __x86_64__
#define EBDIFF_WIDEST(name) choose(name##_base, name##_avx2, name##_avx512)
#else
#define EBDIFF_WIDEST(name) name##_base()
#endif

const Rows& rows() {
  static const Rows& chosen = EBDIFF_WIDEST(rows);
  return chosen;
}

const NormRows& norm_rows() {
  static const NormRows& chosen = EBDIFF_WIDEST(norm_rows);
  return chosen;
}

const LossRows& loss_rows() {
  static const LossRows& chosen = EBDIFF_WIDEST(loss_rows);
  return chosen;
}

}  // namespace ebdiff
