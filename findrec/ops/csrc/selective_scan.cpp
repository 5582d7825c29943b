// Selective scan of Mamba-1 on a CPU, forward and backward; see findrec/ops/selective_scan.py for the maths.
//
// A unit of work is one row and one block of W channels; lanes are channels. States of a unit stay in cache for
// the whole row, are written out at every kChunk steps only, and are recomputed from there in the backward pass.
// Sums over channels (dB, dC) and rows (dA, dD) go through buffers that are added up in a fixed order, so
// results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int64_t kChunk = 32;
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

// e^x to about 1e-7 relative: x = n ln 2 + r, a polynomial for e^r fitted for least relative error on
// |r| <= ln 2 / 2, and n added to the exponent's bits. Below -64 the result is e^-64: no slow denormals.
inline Simd<float>::V vexp(Simd<float>::V x) {
  using V = Simd<float>::V;
  using I = Simd<float>::I;
  const V low = V{} - 64.0f, high = V{} + 88.0f, magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V t = x * 1.44269504f + magic;
  const V n = t - magic;
  V r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  r = r + n * 2.12194440e-4f;
  V p = r * 1.3814598367e-3f + 8.3687168981e-3f;
  p = p * r + 4.1668388051e-2f;
  p = p * r + 1.6666520632e-1f;
  p = p * r + 4.9999993448e-1f;
  p = p * (r * r) + r + 1.0f;
  const I bits = ((I)t << 23) + 0x3F800000;  // the magic number's own bits are shifted out
  return p * (V)bits;
}

inline Simd<double>::V vexp(Simd<double>::V x) {
  for (int k = 0; k < Simd<double>::kLanes; ++k) x[k] = std::exp(x[k]);
  return x;
}

}  // namespace

// All tensors of a call. Steps are the strides in elements between rows and between steps of an input; the last
// dimension is dense. What is not given is null. `A`, states and borders have channels last.
extern "C" struct ScanArgs {
  int64_t rows, steps, channels, states, threads;
  int64_t u_row, u_step, delta_row, delta_step, z_row, z_step, B_row, B_step, C_row, C_step;
  const void *u, *delta, *A, *B, *C, *D, *z, *first;       // first [rows, N, channels]
  void *y, *last, *borders;                                // borders [rows, chunks, N, channels]
  const void *dy, *dlast;                                  // dense
  void *du, *ddelta, *dA, *dB, *dC, *dD, *dz, *dfirst;     // dense; dA [N, channels]
  void *part_BC, *part_A, *part_D;  // [blocks, rows, steps, 2, N], [rows, N, channels], [rows, channels]
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

template <typename T>
inline const T* at(const void* base, int64_t row, int64_t row_stride, int64_t step, int64_t step_stride) {
  return static_cast<const T*>(base) + row * row_stride + step * step_stride;
}

// kN: number of states when known while compiling, else 0.
template <typename T, int kN>
void forward_unit(const ScanArgs& a, int64_t b, int64_t block, typename Simd<T>::V* state) {
  using K = Block<T>;
  using V = typename K::V;
  const int64_t N = kN ? kN : a.states, c0 = block * K::kWidth;
  const int lanes = static_cast<int>(std::min<int64_t>(K::kWidth, a.channels - c0));
  V* A = state + N * kRegs;
  V D[kRegs] = {};
  if (a.D) K::load(D, static_cast<const T*>(a.D) + c0, lanes);
  for (int64_t n = 0; n < N; ++n) {
    K::load(A + n * kRegs, static_cast<const T*>(a.A) + n * a.channels + c0, lanes);
    if (a.first) {
      K::load(state + n * kRegs, static_cast<const T*>(a.first) + (b * N + n) * a.channels + c0, lanes);
    } else {
      for (int r = 0; r < kRegs; ++r) state[n * kRegs + r] = V{};
    }
  }
  for (int64_t l = 0; l < a.steps; ++l) {
    if (l % kChunk == 0) {
      T* border = static_cast<T*>(a.borders) + (b * num_chunks(a) + l / kChunk) * N * a.channels + c0;
      for (int64_t n = 0; n < N; ++n) K::store(border + n * a.channels, state + n * kRegs, lanes);
    }
    V dt[kRegs], x[kRegs], dx[kRegs], y[kRegs];
    K::load(dt, at<T>(a.delta, b, a.delta_row, l, a.delta_step) + c0, lanes);
    K::load(x, at<T>(a.u, b, a.u_row, l, a.u_step) + c0, lanes);
    const T* B = at<T>(a.B, b, a.B_row, l, a.B_step);
    const T* C = at<T>(a.C, b, a.C_row, l, a.C_step);
    for (int r = 0; r < kRegs; ++r) dx[r] = dt[r] * x[r], y[r] = D[r] * x[r];
    for (int64_t n = 0; n < N; ++n) {
      for (int r = 0; r < kRegs; ++r) {
        V& h = state[n * kRegs + r];
        h = vexp(dt[r] * A[n * kRegs + r]) * h + dx[r] * B[n];
        y[r] += h * C[n];
      }
    }
    if (a.z) {
      V z[kRegs];
      K::load(z, at<T>(a.z, b, a.z_row, l, a.z_step) + c0, lanes);
      for (int r = 0; r < kRegs; ++r) y[r] *= z[r] / (vexp(-z[r]) + 1);
    }
    K::store(static_cast<T*>(a.y) + (b * a.steps + l) * a.channels + c0, y, lanes);
  }
  for (int64_t n = 0; n < N; ++n)
    K::store(static_cast<T*>(a.last) + (b * N + n) * a.channels + c0, state + n * kRegs, lanes);
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

// Lane sums of `count` vectors, strided by 2N into the partial dB/dC buffer.
template <typename T>
inline void sum_lanes(const typename Simd<T>::V* from, T* to, int64_t steps, int64_t N) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t l = 0; l < steps; ++l) {
    for (int64_t n = 0; n < N; ++n) {
      const typename Simd<T>::V v = from[l * N + n];
      T half[kLanes / 2];
      for (int k = 0; k < kLanes / 2; ++k) half[k] = v[k] + v[k + kLanes / 2];
      T total = half[0];
      for (int k = 1; k < kLanes / 2; ++k) total += half[k];
      to[l * 2 * N + n] = total;
    }
  }
}

template <typename T, int kN>
void backward_unit(const ScanArgs& a, int64_t b, int64_t block, Workspace<T>& w) {
  using K = Block<T>;
  using V = typename K::V;
  const int64_t N = kN ? kN : a.states, c0 = block * K::kWidth;
  const int lanes = static_cast<int>(std::min<int64_t>(K::kWidth, a.channels - c0));
  V *const A = w.A.data(), *const carry = w.carry.data(), *const dA = w.dA.data();
  V D[kRegs] = {}, dD[kRegs] = {};
  if (a.D) K::load(D, static_cast<const T*>(a.D) + c0, lanes);
  for (int64_t n = 0; n < N; ++n) {
    K::load(A + n * kRegs, static_cast<const T*>(a.A) + n * a.channels + c0, lanes);
    K::load(carry + n * kRegs, static_cast<const T*>(a.dlast) + (b * N + n) * a.channels + c0, lanes);
    for (int r = 0; r < kRegs; ++r) dA[n * kRegs + r] = V{};
  }
  for (int64_t chunk = num_chunks(a) - 1; chunk >= 0; --chunk) {
    const int64_t l0 = chunk * kChunk, steps = std::min(kChunk, a.steps - l0);
    const T* border = static_cast<const T*>(a.borders) + (b * num_chunks(a) + chunk) * N * a.channels + c0;
    for (int64_t n = 0; n < N; ++n) K::load(w.states.data() + n * kRegs, border + n * a.channels, lanes);
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
          decay[i] = vexp(dt[r] * A[i]);
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
      K::load(dy, static_cast<const T*>(a.dy) + out, lanes);
      if (a.z) K::load(z, at<T>(a.z, b, a.z_row, l, a.z_step) + c0, lanes);
      for (int r = 0; r < kRegs; ++r) {
        gate[r] = a.z ? 1 / (vexp(-z[r]) + 1) : V{} + 1;
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
        ddelta[r] += from_input[r] * x[r];
      }
      K::store(static_cast<T*>(a.du) + out, du, lanes);
      K::store(static_cast<T*>(a.ddelta) + out, ddelta, lanes);
      if (a.z) {
        for (int r = 0; r < kRegs; ++r) y[r] *= dy[r] * gate[r] * (1 + z[r] * (1 - gate[r]));
        K::store(static_cast<T*>(a.dz) + out, y, lanes);
      }
    }
    T* part = static_cast<T*>(a.part_BC) + ((block * a.rows + b) * a.steps + l0) * 2 * N;
    sum_lanes<T>(w.sum_B.data(), part, steps, N);
    sum_lanes<T>(w.sum_C.data(), part + N, steps, N);
  }
  for (int64_t n = 0; n < N; ++n) {
    const int64_t to = (b * N + n) * a.channels + c0;
    K::store(static_cast<T*>(a.part_A) + to, dA + n * kRegs, lanes);
    K::store(static_cast<T*>(a.dfirst) + to, carry + n * kRegs, lanes);
  }
  K::store(static_cast<T*>(a.part_D) + b * a.channels + c0, dD, lanes);
}

template <typename T, int kN>
void forward(const ScanArgs& a) {
  const int64_t blocks = num_blocks<T>(a);
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    std::vector<typename Simd<T>::V> buffer(2 * a.states * kRegs);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.rows * blocks; ++i) forward_unit<T, kN>(a, i / blocks, i % blocks, buffer.data());
  }
}

template <typename T, int kN>
void backward(const ScanArgs& a) {
  const int64_t blocks = num_blocks<T>(a), N = a.states, places = a.rows * a.steps;
#pragma omp parallel num_threads(static_cast<int>(a.threads))
  {
    Workspace<T> workspace(N);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.rows * blocks; ++i) backward_unit<T, kN>(a, i / blocks, i % blocks, workspace);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < places; ++i) {
      T *dB = static_cast<T*>(a.dB) + i * N, *dC = static_cast<T*>(a.dC) + i * N;
      std::fill(dB, dB + N, T(0));
      std::fill(dC, dC + N, T(0));
      for (int64_t block = 0; block < blocks; ++block) {
        const T* part = static_cast<const T*>(a.part_BC) + (block * places + i) * 2 * N;
        for (int64_t n = 0; n < N; ++n) dB[n] += part[n], dC[n] += part[N + n];
      }
    }
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < N + 1; ++n) {  // the last turn adds up dD
      const bool skip = n == N;
      T* to = skip ? static_cast<T*>(a.dD) : static_cast<T*>(a.dA) + n * a.channels;
      std::fill(to, to + a.channels, T(0));
      for (int64_t b = 0; b < a.rows; ++b) {
        const T* part = skip ? static_cast<const T*>(a.part_D) + b * a.channels
                             : static_cast<const T*>(a.part_A) + (b * N + n) * a.channels;
        for (int64_t c = 0; c < a.channels; ++c) to[c] += part[c];
      }
    }
  }
}

}  // namespace

extern "C" {
int64_t scan_chunk() { return kChunk; }
int64_t scan_block(int is_double) { return is_double ? Block<double>::kWidth : Block<float>::kWidth; }
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
