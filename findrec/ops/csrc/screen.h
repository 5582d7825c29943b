// The two number formats that scores are screened with, and their products in registers; see target_rank.cpp.
//
// `Int16` rounds a vector to multiples of a unit of its own: the sums of products are exact, so they differ
// from the score only by the bounded rounding error of the vectors. `Float32` takes vectors unchanged and rounds the
// sums. Both pack their numbers into words of 32 bits, one per lane.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace screen {

#if defined(__AVX512BW__)
constexpr int kLanes = 16, kRows = 12;
#else
constexpr int kLanes = 8, kRows = 6;
#endif
constexpr int kItems = 2 * kLanes;  // items of a panel; kRows x kItems sums fill the registers
constexpr double kNorm = 45000.0;   // of a vector in integers: 45000^2 < 2^31, rounding included
constexpr double kSmall = 0x1p-60, kLarge = 0x1p60;  // norms between them cannot overflow or vanish in a screen

struct Sizes {
  double norm;  // in float64
  float largest;
};

// The maximum ignores NaN; the norm detects it.
inline Sizes measure(const float* x, int64_t width) {
  double sum = 0;
  float largest = 0;
#pragma omp simd reduction(+ : sum) reduction(max : largest)
  for (int64_t k = 0; k < width; ++k) {
    const double v = x[k];
    sum += v * v;
    const float size = std::fabs(x[k]);
    largest = size > largest ? size : largest;
  }
  return {std::sqrt(sum), largest};
}

inline bool tame(double norm) { return norm > kSmall && norm < kLarge; }

inline double gamma(int64_t width, double unit) { return width * unit / (1 - width * unit) * (1 + 1e-9); }

// Error bound of a user: |score - sums * unit * (unit of the tile)| <= norm_part * |y| + rest_part * (what
// rounding the items left over).
struct User {
  double unit, norm_part, rest_part, norm;
  double scale = 1 / unit;
};

struct Tile {
  double unit, norm, rest;  // the greatest norm of its items and of what rounding left over
  bool screened;
  double scale = 1 / unit;
};

// Integers of 16 bits, two of them in a word: a vector is rounded to multiples of its unit.
struct Int16 {
  using Sum = int32_t;
  static constexpr int kDeep = 2;

  static double unit_of(const Sizes& s) { return static_cast<float>(std::max(s.norm / kNorm, s.largest / 32700.0)); }

  static double rest_of(double unit, int64_t width) { return 0.51 * unit * std::sqrt(static_cast<double>(width)); }

  static User user(const float* x, int64_t width) {
    const Sizes s = measure(x, width);
    const double unit = unit_of(s), rest = rest_of(unit, width);
    return {unit, rest + gamma(width, 0x1p-53) * s.norm, s.norm + rest, s.norm};
  }

  static Tile tile(const Sizes& s, int64_t width) {
    const double unit = unit_of(s);
    return {unit, s.norm, rest_of(unit, width), true};
  }

  // Every `step` words one pair of neighbours. The float division is off by 2^-8 of a unit at most.
  static void pack(const float* x, int64_t width, double unit, uint32_t* out, int64_t step) {
    const float inverse = static_cast<float>(1 / unit);
    int64_t k = 0;
    for (; k + 1 < width; k += 2, out += step) *out = word(x[k] * inverse, x[k + 1] * inverse);
    if (k < width) *out = word(x[k] * inverse, 0.0f);
  }

  static uint32_t word(float low, float high) {
    const auto a = static_cast<int32_t>(__builtin_rintf(low)), b = static_cast<int32_t>(__builtin_rintf(high));
    return (static_cast<uint32_t>(a) & 0xffffu) | (static_cast<uint32_t>(b) << 16);
  }

  // Two units outwards undo the rounding of this arithmetic, which is below one.
  static Sum upper(double x) { return static_cast<Sum>(std::min(std::max(x + 2, -2147483640.0), 2147483640.0)); }
  static Sum lower(double x) { return static_cast<Sum>(std::min(std::max(x - 2, -2147483640.0), 2147483640.0)); }
  static constexpr Sum kNone = std::numeric_limits<Sum>::max(), kAll = std::numeric_limits<Sum>::min();
};

// The vectors as they are; the sums are rounded.
struct Float32 {
  using Sum = float;
  static constexpr int kDeep = 1;

  static User user(const float* x, int64_t width) {
    const Sizes s = measure(x, width);
    // Subnormal numbers may be flushed to zero: width * 2^-126 * (2 + |x| + |y|), and |y| > 2^-60.
    const double flushed = width * 0x1p-60 * (1 + s.norm);
    return {1.0, (gamma(width, 0x1p-24) + gamma(width, 0x1p-53)) * s.norm + flushed, 0.0, s.norm};
  }

  static Tile tile(const Sizes& s, int64_t) { return {1.0, s.norm, 0.0, true}; }

  static void pack(const float* x, int64_t width, double, uint32_t* out, int64_t step) {
    for (int64_t k = 0; k < width; ++k, out += step) std::memcpy(out, x + k, 4);
  }

  static Sum upper(double x) { return std::nextafter(static_cast<Sum>(x), std::numeric_limits<Sum>::infinity()); }
  static Sum lower(double x) { return std::nextafter(static_cast<Sum>(x), -std::numeric_limits<Sum>::infinity()); }
  static constexpr Sum kNone = std::numeric_limits<Sum>::infinity(), kAll = -std::numeric_limits<Sum>::infinity();
};

// One vector of kLanes sums, what adds a word of user and items to it, and which of them lie above a limit.
#if defined(__AVX512BW__)
template <class Kind>
struct Lanes;
template <>
struct Lanes<Int16> {
  using Vector = __m512i;
  static Vector zero() { return _mm512_setzero_si512(); }
  static Vector load(const void* p) { return _mm512_loadu_si512(p); }
  static Vector repeat(uint32_t word) { return _mm512_set1_epi32(static_cast<int32_t>(word)); }
  static Vector add(Vector sum, Vector a, Vector b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
  }
  static void store(int32_t* p, Vector v) { _mm512_storeu_si512(p, v); }
  static uint32_t above(const int32_t* p, int32_t limit) {
    return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(limit));
  }
};
template <>
struct Lanes<Float32> {
  using Vector = __m512;
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector load(const void* p) { return _mm512_loadu_ps(p); }
  static Vector repeat(uint32_t word) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(word))); }
  static Vector add(Vector sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static uint32_t above(const float* p, float limit) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_set1_ps(limit), _CMP_GT_OQ);
  }
};
#elif defined(__AVX2__) && defined(__FMA__)
template <class Kind>
struct Lanes;
template <>
struct Lanes<Int16> {
  using Vector = __m256i;
  static Vector zero() { return _mm256_setzero_si256(); }
  static Vector load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Vector repeat(uint32_t word) { return _mm256_set1_epi32(static_cast<int32_t>(word)); }
  static Vector add(Vector sum, Vector a, Vector b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static void store(int32_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static uint32_t above(const int32_t* p, int32_t limit) {
    const Vector greater = _mm256_cmpgt_epi32(load(p), _mm256_set1_epi32(limit));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(greater)));
  }
};
template <>
struct Lanes<Float32> {
  using Vector = __m256;
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static Vector repeat(uint32_t word) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(word))); }
  static Vector add(Vector sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static uint32_t above(const float* p, float limit) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(load(p), _mm256_set1_ps(limit), _CMP_GT_OQ)));
  }
};
#else
template <class Kind>
struct Lanes {  // any other processor: the compiler's own vectors
  using Sum = typename Kind::Sum;
  struct Vector {
    uint32_t word[kLanes];
  };
  static Vector zero() { return {}; }
  static Vector load(const void* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static Vector repeat(uint32_t word) {
    Vector v;
    for (auto& w : v.word) w = word;
    return v;
  }
  static Vector add(Vector sum, Vector a, Vector b) {
    for (int i = 0; i < kLanes; ++i) sum.word[i] = add_word(sum.word[i], a.word[i], b.word[i], Kind{});
    return sum;
  }
  static uint32_t add_word(uint32_t sum, uint32_t a, uint32_t b, Int16) {
    const int32_t low = static_cast<int16_t>(a) * static_cast<int16_t>(b);
    const int32_t high = static_cast<int16_t>(a >> 16) * static_cast<int16_t>(b >> 16);
    return sum + static_cast<uint32_t>(low) + static_cast<uint32_t>(high);
  }
  static uint32_t add_word(uint32_t sum, uint32_t a, uint32_t b, Float32) {
    float s, x, y;
    std::memcpy(&s, &sum, 4), std::memcpy(&x, &a, 4), std::memcpy(&y, &b, 4);
    s += x * y;
    std::memcpy(&sum, &s, 4);
    return sum;
  }
  static void store(Sum* p, const Vector& v) { std::memcpy(p, &v, sizeof v); }
  static uint32_t above(const Sum* p, Sum limit) {
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(p[i] > limit) << i;
    return mask;
  }
};
#endif

// sums [kRows, kItems] of a group of users [steps, kRows] and a panel of items [steps, kItems], in words.
template <class Kind>
void multiply(const uint32_t* group, const uint32_t* panel, int64_t steps, typename Kind::Sum* sums) {
  using L = Lanes<Kind>;
  typename L::Vector sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = L::zero();
  for (int64_t k = 0; k < steps; ++k, group += kRows, panel += kItems) {
    const auto left = L::load(panel), right = L::load(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto user = L::repeat(group[r]);
      sum[r][0] = L::add(sum[r][0], left, user);
      sum[r][1] = L::add(sum[r][1], right, user);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    L::store(sums + r * kItems, sum[r][0]);
    L::store(sums + r * kItems + kLanes, sum[r][1]);
  }
}

// Which lanes of a row of sums lie above a limit.
template <class Kind>
inline uint32_t above(const typename Kind::Sum* sums, typename Kind::Sum limit) {
  return Lanes<Kind>::above(sums, limit) | Lanes<Kind>::above(sums + kLanes, limit) << kLanes;
}

}  // namespace screen
