// Selective scan of Mamba-1 on a CPU, forward and backward; see findrec/ops/scan/selective_scan.py for the maths.
//
// A unit of work is one row and one block of W channels; lanes are channels. States of a unit stay in cache for
// the whole row, are written out at every kChunk steps only, and are recomputed from there in the backward pass.
//
// Sums over channels (dB, dC) and rows (dA, dD) are added up in place and in a fixed order: a unit waits until the
// one before it has added its part. So there are no buffers to add up afterwards, and results do not depend on
// the number of threads. Units are handed out in order, so the unit that is waited for has been started.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int64_t kChunk = 64;  // border states are 1/kChunk of all states: the main extra memory
constexpr int kBlockBytes = kVectorBytes > 64 ? kVectorBytes : 64;  // channels of a unit
constexpr int kRegs = kBlockBytes / kVectorBytes;

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / 8;
};

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// 2^x to about 1e-7 relative: x = n + f, a polynomial for 2^f fitted for least relative error on |f| <= 1/2 with
// 2^0 = 1 exactly, and n added to the exponent's bits. Below -92 the result is 2^-92: no slow denormals. Base 2
// as its factor log2(e) can be multiplied into `A` once for all steps.
inline Simd<float>::V vexp2(Simd<float>::V x) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  const V low = V{} - 92.0f, high = V{} + 127.0f, magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V t = x + magic;
  const V f = x - (t - magic);
  V p = f * 1.5353358203e-4f + 1.3398878535e-3f;
  p = p * f + 9.6184374061e-3f;
  p = p * f + 5.5503324580e-2f;
  p = p * f + 2.4022647913e-1f;
  p = p * f + 6.9314720286e-1f;
  p = p * f + 1.0f;
  return (V)((I)p + ((I)t << 23));  // the magic number's own bits are shifted out
}

inline Simd<double>::V vexp2(Simd<double>::V x) {
  for (int k = 0; k < Simd<double>::kLanes; ++k) x[k] = std::exp2(x[k]);
  return x;
}

inline Simd<float>::V sigmoid(Simd<float>::V x) { return 1 / (vexp2(x * static_cast<float>(-kLog2e)) + 1); }
inline Simd<double>::V sigmoid(Simd<double>::V x) { return 1 / (vexp2(x * -kLog2e) + 1); }

}  // namespace

// All tensors of a call. Steps are the strides in elements between rows and between steps of an input; the last
// dimension is dense. Unused ones are null. `A`, states and borders have channels last.
extern "C" struct ScanArgs {
  int64_t rows, steps, channels, states, threads;
  int64_t u_row, u_step, delta_row, delta_step, z_row, z_step, B_row, B_step, C_row, C_step, dy_row, dy_step;
  const void *u, *delta, *A, *B, *C, *D, *z, *first;    // first [rows, N, channels]
  void *y, *last, *borders;                             // borders [rows, chunks - 1, N, channels]
  const void *dy, *dlast;                               // dlast [rows, N, channels]
  void *du, *ddelta, *dA, *dB, *dC, *dD, *dz, *dfirst;  // dense; dA [N, channels]
};

namespace {

template <typename T>
struct Block {
  using V = typename Simd<T>::V;
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr int kWidth = kLanes * kRegs;

  // Unused lanes of the last block read as zero and are never written.
  static inline void load(V* to, const T* from, int lanes) {
    if (lanes == kWidth) {
      std::memcpy(to, from, sizeof(V) * kRegs);
    } else {
      T buffer[kWidth] = {};
      std::memcpy(buffer, from, sizeof(T) * lanes);
      std::memcpy(to, buffer, sizeof(buffer));
    }
  }
  static inline void store(T* to, const V* from, int lanes) { std::memcpy(to, from, sizeof(T) * lanes); }
};

template <typename T>
inline int64_t num_blocks(const ScanArgs& a) {
  return (a.channels + Block<T>::kWidth - 1) / Block<T>::kWidth;
}

inline int64_t num_chunks(const ScanArgs& a) { return (a.steps + kChunk - 1) / kChunk; }

// The state before a chunk, for a block that starts at channel c0. The first chunk starts from the given initial state.
template <typename T>
inline T* border(const ScanArgs& a, int64_t b, int64_t chunk, int64_t c0) {
  return static_cast<T*>(a.borders) + (b * (num_chunks(a) - 1) + chunk - 1) * a.states * a.channels + c0;
}

template <typename T>
inline const T* at(const void* base, int64_t row, int64_t row_stride, int64_t step, int64_t step_stride) {
  return static_cast<const T*>(base) + row * row_stride + step * step_stride;
}

// `to` [N, kRegs] from `from` [N, channels], or zeros when that is null.
template <typename T>
inline void load_states(const ScanArgs& a, typename Simd<T>::V* to, const T* from, int lanes) {
  for (int64_t n = 0; n < a.states; ++n) {
    if (from) {
      Block<T>::load(to + n * kRegs, from + n * a.channels, lanes);
    } else {
      for (int r = 0; r < kRegs; ++r) to[n * kRegs + r] = typename Simd<T>::V{};
    }
  }
}

template <typename T>
inline void store_states(const ScanArgs& a, T* to, const typename Simd<T>::V* from, int lanes) {
  for (int64_t n = 0; n < a.states; ++n) Block<T>::store(to + n * a.channels, from + n * kRegs, lanes);
}

// Of a tensor [rows, N, channels]; null stays null.
template <typename T>
inline T* states_of(const ScanArgs& a, const void* base, int64_t b, int64_t c0) {
  return base ? const_cast<T*>(static_cast<const T*>(base)) + b * a.states * a.channels + c0 : nullptr;
}

// kN: number of states when known while compiling, else 0.
template <typename T, int kN>
void forward_unit(const ScanArgs& a, int64_t b, int64_t block, typename Simd<T>::V* state) {
  using K = Block<T>;
  using V = typename K::V;
  const int64_t N = kN ? kN : a.states, c0 = block * K::kWidth;
  const int lanes = static_cast<int>(std::min<int64_t>(K::kWidth, a.channels - c0));
  V* A = state + N * kRegs;  // times log2(e)
  V D[kRegs] = {};
  if (a.D) K::load(D, static_cast<const T*>(a.D) + c0, lanes);
  load_states<T>(a, A, static_cast<const T*>(a.A) + c0, lanes);
  load_states<T>(a, state, states_of<T>(a, a.first, b, c0), lanes);
  for (int64_t i = 0; i < N * kRegs; ++i) A[i] *= static_cast<T>(kLog2e);
  for (int64_t l = 0; l < a.steps; ++l) {
    if (a.borders && l && l % kChunk == 0) store_states<T>(a, border<T>(a, b, l / kChunk, c0), state, lanes);
    V dt[kRegs], x[kRegs], dx[kRegs], y[kRegs];
    K::load(dt, at<T>(a.delta, b, a.delta_row, l, a.delta_step) + c0, lanes);
    K::load(x, at<T>(a.u, b, a.u_row, l, a.u_step) + c0, lanes);
    const T* B = at<T>(a.B, b, a.B_row, l, a.B_step);
    const T* C = at<T>(a.C, b, a.C_row, l, a.C_step);
    for (int r = 0; r < kRegs; ++r) dx[r] = dt[r] * x[r], y[r] = D[r] * x[r];
    for (int64_t n = 0; n < N; ++n) {
      for (int r = 0; r < kRegs; ++r) {
        V& h = state[n * kRegs + r];
        h = vexp2(dt[r] * A[n * kRegs + r]) * h + dx[r] * B[n];
        y[r] += h * C[n];
      }
    }
    if (a.z) {
      V z[kRegs];
      K::load(z, at<T>(a.z, b, a.z_row, l, a.z_step) + c0, lanes);
      for (int r = 0; r < kRegs; ++r) y[r] *= z[r] * sigmoid(z[r]);
    }
    K::store(static_cast<T*>(a.y) + (b * a.steps + l) * a.channels + c0, y, lanes);
  }
  if (a.last) store_states<T>(a, states_of<T>(a, a.last, b, c0), state, lanes);
}

// Buffers of a backward unit, one set for each thread.
template <typename T>
struct Workspace {
  using V = typename Simd<T>::V;
  explicit Workspace(int64_t N)
      : states((kChunk + 1) * N * kRegs), decays(kChunk * N * kRegs), sum_B(kChunk * N), sum_C(kChunk * N),
        carry(N * kRegs), A(N * kRegs), dA(N * kRegs) {}
  std::vector<V> states, decays, sum_B, sum_C, carry, A, dA;
};

// How many chunks each unit has added to dB and dC, plus one when it has added to dA and dD too.
struct Progress {
  explicit Progress(int64_t units) : done(units) {}
  std::vector<std::atomic<int64_t>> done;

  void wait_for(int64_t unit, int64_t count) {
    for (int spins = 0; done[unit].load(std::memory_order_acquire) < count; ++spins)
      if (spins > 1000) std::this_thread::yield();  // its thread may not be running
  }
  void advance(int64_t unit) { done[unit].fetch_add(1, std::memory_order_release); }
};

template <typename T>
inline T sum_lanes(typename Simd<T>::V v) {
  constexpr int kHalf = Simd<T>::kLanes / 2;
  T half[kHalf];
  for (int k = 0; k < kHalf; ++k) half[k] = v[k] + v[k + kHalf];
  T total = half[0];
  for (int k = 1; k < kHalf; ++k) total += half[k];
  return total;
}

template <typename T>
inline void put(T* to, T value, bool add) {
  *to = add ? *to + value : value;
}

template <typename T, int kN>
void backward_unit(const ScanArgs& a, int64_t b, int64_t block, Workspace<T>& w, Progress& progress) {
  using K = Block<T>;
  using V = typename K::V;
  const int64_t N = kN ? kN : a.states, c0 = block * K::kWidth;
  const int lanes = static_cast<int>(std::min<int64_t>(K::kWidth, a.channels - c0));
  const int64_t blocks = num_blocks<T>(a), chunks = num_chunks(a), unit = b * blocks + block;
  V *const A = w.A.data(), *const carry = w.carry.data(), *const dA = w.dA.data();
  V D[kRegs] = {}, dD[kRegs] = {};
  if (a.D) K::load(D, static_cast<const T*>(a.D) + c0, lanes);
  load_states<T>(a, A, static_cast<const T*>(a.A) + c0, lanes);
  load_states<T>(a, carry, states_of<T>(a, a.dlast, b, c0), lanes);
  load_states<T>(a, dA, static_cast<const T*>(nullptr), lanes);
  for (int64_t k = 0; k < N * kRegs; ++k) A[k] *= static_cast<T>(kLog2e);
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t l0 = chunk * kChunk, steps = std::min(kChunk, a.steps - l0);
    load_states<T>(a, w.states.data(), chunk ? border<T>(a, b, chunk, c0) : states_of<T>(a, a.first, b, c0), lanes);
    for (int64_t s = 0; s < steps; ++s) {
      V dt[kRegs], dx[kRegs];
      K::load(dt, at<T>(a.delta, b, a.delta_row, l0 + s, a.delta_step) + c0, lanes);
      K::load(dx, at<T>(a.u, b, a.u_row, l0 + s, a.u_step) + c0, lanes);
      const T* B = at<T>(a.B, b, a.B_row, l0 + s, a.B_step);
      const V* before = w.states.data() + s * N * kRegs;
      V* after = w.states.data() + (s + 1) * N * kRegs;
      V* decay = w.decays.data() + s * N * kRegs;
      for (int r = 0; r < kRegs; ++r) dx[r] *= dt[r];
      for (int64_t n = 0; n < N; ++n) {
        for (int r = 0; r < kRegs; ++r) {
          const int64_t i = n * kRegs + r;
          decay[i] = vexp2(dt[r] * A[i]);
          after[i] = decay[i] * before[i] + dx[r] * B[n];
        }
      }
    }
    for (int64_t s = steps - 1; s >= 0; --s) {
      const int64_t l = l0 + s, out = (b * a.steps + l) * a.channels + c0;
      V dt[kRegs], x[kRegs], dx[kRegs], dy[kRegs], g[kRegs], z[kRegs], gate[kRegs];
      V y[kRegs], from_input[kRegs], ddelta[kRegs];  // y before the gate; gradients of delta u and delta
      K::load(dt, at<T>(a.delta, b, a.delta_row, l, a.delta_step) + c0, lanes);
      K::load(x, at<T>(a.u, b, a.u_row, l, a.u_step) + c0, lanes);
      K::load(dy, at<T>(a.dy, b, a.dy_row, l, a.dy_step) + c0, lanes);
      if (a.z) K::load(z, at<T>(a.z, b, a.z_row, l, a.z_step) + c0, lanes);
      for (int r = 0; r < kRegs; ++r) {
        gate[r] = a.z ? sigmoid(z[r]) : V{} + 1;
        g[r] = a.z ? dy[r] * z[r] * gate[r] : dy[r];
        dD[r] += g[r] * x[r];
        dx[r] = dt[r] * x[r];
        y[r] = D[r] * x[r];
        from_input[r] = ddelta[r] = V{};
      }
      const T* B = at<T>(a.B, b, a.B_row, l, a.B_step);
      const T* C = at<T>(a.C, b, a.C_row, l, a.C_step);
      const V* before = w.states.data() + s * N * kRegs;
      const V* after = w.states.data() + (s + 1) * N * kRegs;
      const V* decay = w.decays.data() + s * N * kRegs;
      for (int64_t n = 0; n < N; ++n) {
        V sum_B = V{}, sum_C = V{};
        for (int r = 0; r < kRegs; ++r) {
          const int64_t i = n * kRegs + r;
          const V h = after[i];
          y[r] += h * C[n];
          sum_C += g[r] * h;
          const V dh = carry[i] + g[r] * C[n];
          sum_B += dh * dx[r];
          from_input[r] += dh * B[n];
          const V back = dh * decay[i];
          carry[i] = back;
          const V exponent = back * before[i];
          dA[i] += exponent * dt[r];
          ddelta[r] += exponent * A[i];
        }
        w.sum_B[s * N + n] = sum_B;
        w.sum_C[s * N + n] = sum_C;
      }
      V du[kRegs];
      for (int r = 0; r < kRegs; ++r) {
        du[r] = g[r] * D[r] + from_input[r] * dt[r];
        ddelta[r] = ddelta[r] * static_cast<T>(kLn2) + from_input[r] * x[r];  // A was in base 2
      }
      K::store(static_cast<T*>(a.du) + out, du, lanes);
      K::store(static_cast<T*>(a.ddelta) + out, ddelta, lanes);
      if (a.z) {
        for (int r = 0; r < kRegs; ++r) y[r] *= dy[r] * gate[r] * (1 + z[r] * (1 - gate[r]));
        K::store(static_cast<T*>(a.dz) + out, y, lanes);
      }
    }
    // Sum over the lanes, then wait: what others wait for is short.
    T *sum_B = reinterpret_cast<T*>(w.sum_B.data()), *sum_C = reinterpret_cast<T*>(w.sum_C.data());
    for (int64_t k = 0; k < steps * N; ++k) {
      sum_B[k] = sum_lanes<T>(w.sum_B[k]);
      sum_C[k] = sum_lanes<T>(w.sum_C[k]);
    }
    T* dB = static_cast<T*>(a.dB) + (b * a.steps + l0) * N;
    T* dC = static_cast<T*>(a.dC) + (b * a.steps + l0) * N;
    if (block) progress.wait_for(unit - 1, chunks - chunk);
    for (int64_t k = 0; k < steps * N; ++k) {
      put(dB + k, sum_B[k], block > 0);
      put(dC + k, sum_C[k], block > 0);
    }
    progress.advance(unit);
  }
  if (a.dfirst) store_states<T>(a, states_of<T>(a, a.dfirst, b, c0), carry, lanes);
  if (b) progress.wait_for(unit - blocks, chunks + 1);
  const T *row_dA = reinterpret_cast<const T*>(dA), *row_dD = reinterpret_cast<const T*>(dD);
  for (int64_t n = 0; n < N; ++n)
    for (int c = 0; c < lanes; ++c)
      put(static_cast<T*>(a.dA) + n * a.channels + c0 + c, row_dA[n * K::kWidth + c], b > 0);
  for (int c = 0; c < lanes; ++c) put(static_cast<T*>(a.dD) + c0 + c, row_dD[c], b > 0);
  progress.advance(unit);
}

template <typename T, int kN>
void forward(const ScanArgs& a) {
  const int64_t blocks = num_blocks<T>(a);
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    std::vector<typename Simd<T>::V> buffer(2 * a.states * kRegs);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.rows * blocks; ++i) forward_unit<T, kN>(a, i / blocks, i % blocks, buffer.data());
  }
}

template <typename T, int kN>
void backward(const ScanArgs& a) {
  const int64_t blocks = num_blocks<T>(a), units = a.rows * blocks;
  Progress progress(units);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Workspace<T> workspace(a.states);
    for (int64_t i = next.fetch_add(1); i < units; i = next.fetch_add(1))
      backward_unit<T, kN>(a, i / blocks, i % blocks, workspace, progress);
  }
}

}  // namespace

extern "C" {
int64_t scan_chunk() { return kChunk; }
void scan_forward(const ScanArgs* a, int is_double) {
  if (is_double) forward<double, 0>(*a);
  else if (a->states == 16) forward<float, 16>(*a);
  else forward<float, 0>(*a);
}
void scan_backward(const ScanArgs* a, int is_double) {
  if (is_double) backward<double, 0>(*a);
  else if (a->states == 16) backward<float, 16>(*a);
  else backward<float, 0>(*a);
}
}
