// The arithmetic is that of cpu/rows.h, operation by operation. Compiled with --fmad=false, so that both give the same bits.
#include "tile.cuh"

namespace ebdiff::cuda {
namespace {

template <class C>
struct Numbers {  // in the order of AdamWArgs, then the gradient's sign
  C one_minus_beta1, beta2, one_minus_beta2, decay, inverse_bias2, eps, step_size, one_minus_ema, sign;
};
constexpr int kNumbers = 9;

template <class T>
struct State {
  T *p, *m, *v, *e;
  const T* g;
};

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// N elements at a time: a piece of 16 bytes, or one.
template <class T, int N>
__device__ __forceinline__ void step(const State<T>& state, int64_t at, uint32_t kept, const Numbers<compute_t<T>>& n) {
  using C = compute_t<T>;
  T p[N], g[N], m[N], v[N], e[N];
  if (!kept) {
#pragma unroll
    for (int k = 0; k < N; ++k) p[k] = T{};
    write(state.p + at, p);
    write(state.m + at, p);
    write(state.v + at, p);
    if (state.e) write(state.e + at, p);
    return;
  }
  read(state.p + at, p);
  read(state.g + at, g);
  read(state.m + at, m);
  read(state.v + at, v);
  if (state.e) read(state.e + at, e);
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const bool alive = kept >> k & 1;
    const C gradient = load(g[k]) * n.sign;
    const C mean = load(m[k]) + (gradient - load(m[k])) * n.one_minus_beta1;
    const C square = load(v[k]) * n.beta2 + gradient * gradient * n.one_minus_beta2;
    const C change = mean / (root(square) * n.inverse_bias2 + n.eps) * n.step_size;
    p[k] = alive ? store<T>(load(p[k]) * n.decay - change) : T{};
    m[k] = alive ? store<T>(mean) : T{};
    v[k] = alive ? store<T>(square) : T{};
    if (state.e) e[k] = alive ? store<T>(load(e[k]) - (load(e[k]) - load(p[k])) * n.one_minus_ema) : T{};
  }
  write(state.p + at, p);
  write(state.m + at, m);
  write(state.v + at, v);
  if (state.e) write(state.e + at, e);
}

template <class T, int N>
__device__ __forceinline__ void steps(const State<T>& state, const Tile& tile, const Walk& walk, const Kept& kept,
                                      const Numbers<compute_t<T>>& n, int begin, int end) {
#pragma unroll 1
  for (int i = begin + int(threadIdx.x) * N; i < end; i += kThreads * N) {
    const Spot spot = walk(i);
    step<T, N>(state, tile.offset(i, spot), kept(spot, N), n);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    masked_adamw_kernel(const __grid_constant__ Tensors<5> tensors, const View view, const Chunk chunk,
                        const Numbers<compute_t<T>> given, const double* numbers) {
  using C = compute_t<T>;
  __shared__ Numbers<C> shared;  // one conversion from double for a block: it is slow on most cards
  if (threadIdx.x == 0) shared = given;
  __syncthreads();
  if (numbers && threadIdx.x < kNumbers - 1) (&shared.one_minus_beta1)[threadIdx.x] = C(__ldg(numbers + threadIdx.x));
  __syncthreads();
  const Numbers<C> n = shared;
  const Tile tile(view, chunk, view.tiles, false);
  char* const* at = tensors.at[tile.slab];
  const State<T> state{reinterpret_cast<T*>(at[0]), reinterpret_cast<T*>(at[2]), reinterpret_cast<T*>(at[3]),
                       reinterpret_cast<T*>(at[4]), reinterpret_cast<const T*>(at[1])};
  const Walk walk(tile.start, tile.entry.cols, tile.entry.cols_inverse);
  const Kept kept(view, tile.entry);
  constexpr int kPiece = 16 / sizeof(T);
  int begin = 0;
  if (are_aligned(at[0], at[1], at[2], at[3], at[4]) && in_pieces(tile.entry, kPiece)) {
    begin = tile.count & -kPiece;
    steps<T, kPiece>(state, tile, walk, kept, n, 0, begin);
  }
  steps<T, 1>(state, tile, walk, kept, n, begin, tile.count);
}

template <class T>
void run(const Place& place, const std::array<const Addresses*, 5>& lists, const AdamWArgs& a, const double* numbers) {
  using C = compute_t<T>;
  const Numbers<C> given{C(a.one_minus_beta1), C(a.beta2), C(a.one_minus_beta2), C(a.decay), C(a.inverse_bias2),
                         C(a.eps), C(a.step_size), C(a.one_minus_ema), C(a.maximize ? -1 : 1)};
  const std::vector<int> kinds(lists[0]->size(), 0);
  in_chunks<5>(place.table.tiles, lists, kinds, [&](const Tensors<5>& tensors, const Chunk& chunk, int blocks) {
    EBDIFF_LAUNCH(masked_adamw_kernel<T>, blocks, kThreads, place.stream, tensors, place.table.at(place.at), chunk, given,
                  numbers);
  });
}

}  // namespace

void masked_adamw(const Place& place, Dtype dtype, const Addresses& p, const Addresses& g, const Addresses& m,
                  const Addresses& v, const Addresses& e, const AdamWArgs& args, const double* numbers) {
  const OnDevice on(place.device);
  const std::array<const Addresses*, 5> lists{&p, &g, &m, &v, &e};
  switch (dtype) {
    case Dtype::f32: return run<float>(place, lists, args, numbers);
    case Dtype::f64: return run<double>(place, lists, args, numbers);
    case Dtype::bf16: return run<bfloat16>(place, lists, args, numbers);
    case Dtype::f16: return run<float16>(place, lists, args, numbers);
  }
  throw std::invalid_argument("no such dtype");
}

}  // namespace ebdiff::cuda
