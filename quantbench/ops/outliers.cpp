// quantbench::outlier_stats on a CPU: every statistic of x [rows, columns] in one pass over memory.
//
// What is exact is done on the bits: without its sign a float orders like the integer it is stored as, and NaN comes
// above infinity. So a maximum needs no conversion and lets NaN through, and a threshold is the smallest bit pattern
// that is not below it.
//
// Powers are summed in float32 over 128 elements, then in double. How far off that can be is known (ROUNDINGS and
// `precise`). Where it might be more than TOLERANCE, as the mean is not small beside the deviation, or where a fourth
// power may leave the range, a piece is summed again, in double and about its mean, while it is in the cache.
//
// No bit of a result depends on the number of threads (blocks of rows are cut by the shape and merged in order), nor on
// the width of the vectors: an element goes to one of the 16 lanes of its cache line, however many registers they fill.
// Where a product is added without a rounding `fma` says so, and the compiler makes none by itself (-ffp-contract=off).
//
// Written with the vectors that g++ and clang++ share. -ffast-math would undo all of it, and the treatment of NaN.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif
#if defined(__AVX512BW__) && !defined(NARROW)  // NARROW: the build with vectors of 256 bits for such a processor
#define VECTORS_512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTORS_256
#endif
#if defined(VECTORS_512) || defined(VECTORS_256)
#include <immintrin.h>
#endif

namespace {

#if defined(VECTORS_512)
constexpr int WIDTH = 64;  // bytes of a vector
#elif defined(VECTORS_256)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
typedef float F32 __attribute__((vector_size(WIDTH)));
typedef double F64 __attribute__((vector_size(WIDTH)));
typedef int32_t I32 __attribute__((vector_size(WIDTH)));
typedef int16_t I16 __attribute__((vector_size(WIDTH)));
typedef float Eight32 __attribute__((vector_size(32)));
typedef int32_t EightBits __attribute__((vector_size(32)));

constexpr int LINE = 64, STRANDS = LINE / WIDTH;     // bytes of a line of the cache, and vectors that it fills
constexpr int LANES = WIDTH / 4;                     // floats of a vector
constexpr int64_t GROUP = 128;                       // elements whose powers are summed in float32
constexpr int64_t PIECE = 8192;                      // elements that stay in the cache until they are done with
constexpr int64_t MOST_ROWS = 64;                    // of a piece, where rows are short
constexpr int64_t BLOCK = 1 << 16;                   // elements, about, of the rows that a thread takes at once
constexpr int64_t LARGE = 1 << 23;                   // bytes of q from which large memory pages are asked for
constexpr int64_t AHEAD = 8192;                      // bytes by which reading is ahead of summing: far, as memory is
constexpr double TOLERANCE = 8e-7;                   // of a piece; of all pieces, about another mean, 1e-6 is promised
constexpr double UNIT = 0x1p-24;                     // the relative error of a rounding to float32

template <class To, class From> To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V> V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// a * b + c with one rounding, where the processor has that.
inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(VECTORS_512)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(VECTORS_256)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Eight floats as doubles, in as many vectors as they fill.
struct Eight64 {
  F64 v[STRANDS];
};
inline Eight64 widen(Eight32 x) {
#if defined(VECTORS_512)
  return {{(F64)_mm512_cvtps_pd((__m256)x)}};
#elif defined(VECTORS_256)
  const __m128 low = _mm256_castps256_ps128((__m256)x), high = _mm256_extractf128_ps((__m256)x, 1);
  return {{(F64)_mm256_cvtps_pd(low), (F64)_mm256_cvtps_pd(high)}};
#else
  Eight64 wide;
  for (int l = 0; l < 8; ++l) wide.v[l / (WIDTH / 8)][l % (WIDTH / 8)] = double(x[l]);
  return wide;
#endif
}

// Sums in double, in eight lanes.
struct Eight {
  F64 v[STRANDS]{};

  void add(Eight32 x) {
    const Eight64 wide = widen(x);
    for (int h = 0; h < STRANDS; ++h) v[h] += wide.v[h];
  }

  void add_halves(const F32 (&line)[STRANDS]) {
    Eight32 halves[2];
    std::memcpy(halves, line, sizeof halves);
    for (Eight32 half : halves) add(half);
  }

  void add_sum_of_halves(const F32 (&line)[STRANDS]) {
    Eight32 halves[2];
    std::memcpy(halves, line, sizeof halves);
    add(halves[0] + halves[1]);
  }

  double total() const {
    double lanes[8];
    std::memcpy(lanes, v, sizeof lanes);
    for (int half : {4, 2, 1})
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    return lanes[0];
  }
};

// Roundings to float32 that an element's first, second, third and fourth power undergo until it is in a double.
struct Roundings {
  double s1, s2, s3, s4;
};

struct Float32 {
  using Bits = int32_t;
  using Vector = I32;
  static constexpr Bits INF = 0x7f800000;
  static constexpr Roundings ROUNDINGS{5, 4, 7, 8};
  static float value(Bits bits) { return as<float>(bits); }
  static Eight32 eight(const Bits* x) { return load<Eight32>(x); }
  static void unpack(const Bits*, int, I32 bits, F32* parts) { parts[0] = as<F32>(bits); }
};

// The square of a half is exact. A 32-bit lane holds two: the low ones come first, then the high ones.
template <class Format> struct Half {
  using Bits = int16_t;
  using Vector = I16;
  static constexpr Roundings ROUNDINGS{5, 3, 6, 6};
  static float value(Bits bits) { return Format::template widen<float>(int32_t(uint32_t(uint16_t(bits)) << 16)); }
  static Eight32 eight(const Bits* x) {
#if defined(VECTORS_512) || defined(VECTORS_256)
    const __m256i high = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(x)), 16);
    return Format::template widen<Eight32>(as<EightBits>(high));
#else
    Eight32 values;
    for (int l = 0; l < 8; ++l) values[l] = value(x[l]);
    return values;
#endif
  }
  static void unpack(const Bits*, int, I16 bits, F32* parts) {
    I32 pairs = as<I32>(bits);
    parts[0] = Format::template widen<F32>(pairs << 16);
    parts[1] = Format::template widen<F32>(pairs & int32_t(0xffff0000));
  }
};
struct BFloat16 : Half<BFloat16> {
  static constexpr Bits INF = 0x7f80;
  template <class F, class I> static F widen(I high) { return as<F>(high); }
};
struct Float16 : Half<Float16> {  // the finite ones, subnormal or not
  static constexpr Bits INF = 0x7c00;
  template <class F, class I> static F widen(I high) { return as<F>((high >> 3) & int32_t(0x8fffe000)) * 0x1p112f; }
#if defined(VECTORS_512)
  static Eight32 eight(const Bits* x) { return (Eight32)_mm256_cvtph_ps(load<__m128i>(x)); }
  static void unpack(const Bits* line, int, I16, F32* parts) {
    for (int k = 0; k < 2; ++k) parts[k] = (F32)_mm512_cvtph_ps(load<__m256i>(line + 16 * k));
  }
#elif defined(VECTORS_256)
  static Eight32 eight(const Bits* x) { return (Eight32)_mm256_cvtph_ps(load<__m128i>(x)); }
  static void unpack(const Bits* line, int strand, I16, F32* parts) {
    for (int k = 0; k < 2; ++k) parts[k] = (F32)_mm256_cvtph_ps(load<__m128i>(line + 16 * k + 8 * strand));
  }
#endif
};

// Sums of the powers of n elements.
struct Powers {
  double n = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0;
};

// The moments of n elements: their mean, and sums of powers of the distance from it.
struct Moments {
  double n = 0, mean = 0, m2 = 0, m3 = 0, m4 = 0;

  static Moments about(double origin, const Powers& p) {
    double m = p.s1 / p.n;
    return {p.n, origin + m, p.s2 - m * p.s1, p.s3 - m * (3 * p.s2 - 2 * m * p.s1),
            p.s4 - m * (4 * p.s3 - m * (6 * p.s2 - 3 * m * p.s1))};
  }

  void merge(const Moments& b) {  // Pebay, SAND2008-6212
    double sum = n + b.n, d = b.mean - mean, r = d / sum, product = n * b.n;
    m4 += b.m4 + product * (n * n - product + b.n * b.n) * d * r * r * r +
          6 * r * r * (n * n * b.m2 + b.n * b.n * m2) + 4 * r * (n * b.m3 - b.n * m3);
    m3 += b.m3 + product * (n - b.n) * d * r * r + 3 * r * (n * b.m2 - b.n * m2);
    m2 += b.m2 + product * d * r;
    mean += r * b.n;
    n = sum;
  }
};

struct Outputs {
  float *row_absmax, *row_l2;
  int32_t* row_count;
  float* col_absmax;
  int32_t* col_count;
  double* moments;
  int8_t* q;  // null: not wanted
  float* row_scale;
};

template <class T> struct Kernel {
  using Bits = typename T::Bits;
  using Vector = typename T::Vector;
  static constexpr Bits SIZE = std::numeric_limits<Bits>::max();  // all but the sign

  const Bits* x;
  int64_t rows, columns, stride;
  Bits least;        // magnitude of an outlier
  const Bits* kept;  // by column, all ones or zero; null: no mask of columns
  Outputs out;
  int64_t piece_rows = std::clamp<int64_t>(PIECE / columns, 1, MOST_ROWS);
  int64_t block_rows = std::max<int64_t>(BLOCK / (piece_rows * columns), 1) * piece_rows;

  struct Columns {  // a thread's share of what is per column
    std::vector<Bits> top;
    std::vector<int32_t> count;
  };
  struct Row {
    Bits top;
    int32_t count;
    double square;
  };
  struct Sums {
    Vector top{};
    Eight s1, s2, s3, s4;
  };

  static float magnitude(Bits size) { return size > T::INF ? NAN : size == T::INF ? INFINITY : T::value(size); }
  static bool in_range(float absmax) { return absmax == 0 || (absmax >= 1e-6f && absmax <= 1e8f); }
  static bool is_outlier(Bits size, Bits least) { return (size >= least) & (size <= T::INF); }

  // The smallest magnitude that is an outlier; where none is, that of a NaN, which does not count.
  static Bits least_outlier(float threshold) {
    int64_t low = 0, high = T::INF;
    if (!(threshold > 0)) return T::INF + 1;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if (magnitude(Bits(middle)) >= threshold) high = middle;
      else low = middle + 1;
    }
    return Bits(low);
  }

  // GROUP elements; zeros may fill it up.
  static void add(Sums& sums, const Bits* x, Bits* col_top) {
    constexpr int PER_LINE = LINE / sizeof(Bits), STEP = WIDTH / sizeof(Bits), PARTS = STEP / LANES;
    F32 s1[STRANDS], s2[STRANDS], s3[STRANDS], s4[STRANDS];
    Vector top = sums.top;
    for (int h = 0; h < STRANDS; ++h) {
      F32 sum, squares[4], third[2], fourth[2];
      for (int i = 0; i < 4; ++i) {
        F32 v[2], square[2];
        for (int k = 0; k < 2 / PARTS; ++k) {
          const int line = (2 / PARTS * i + k) * PER_LINE, at = line + h * STEP;
          Vector bits = load<Vector>(x + at), col = load<Vector>(col_top + at), size = bits & SIZE;
          top = top > size ? top : size;
          col = col > size ? col : size;
          std::memcpy(col_top + at, &col, sizeof col);
          T::unpack(x + line, h, bits, v + k * PARTS);
        }
        for (int k = 0; k < 2; ++k) square[k] = v[k] * v[k];
        sum = i ? sum + (v[0] + v[1]) : v[0] + v[1];
        squares[i] = fma(v[1], v[1], square[0]);
        for (int k = 0; k < 2; ++k) {
          third[k] = i ? fma(square[k], v[k], third[k]) : square[k] * v[k];
          fourth[k] = i ? fma(square[k], square[k], fourth[k]) : square[k] * square[k];
        }
      }
      s1[h] = sum;
      s2[h] = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      s3[h] = third[0] + third[1];
      s4[h] = fourth[0] + fourth[1];
    }
    sums.top = top;
    sums.s1.add_sum_of_halves(s1);
    sums.s2.add_halves(s2);
    sums.s3.add_sum_of_halves(s3);
    sums.s4.add_sum_of_halves(s4);
  }

  // Elements [i, i + height) x [j, j + width) of x: their moments, and what they add to their rows and columns.
  Moments piece(int64_t i, int64_t height, int64_t j, int64_t width, Row* row, Columns& cols) const {
    Sums sums;
    Bits top = 0;
    double s2 = 0;
    for (int64_t r = 0; r < height; ++r) {
      const Bits* from = x + (i + r) * stride + j;
      sums.top = Vector{};
      sums.s2 = Eight{};
      int64_t c = 0;
      for (; c + GROUP <= width; c += GROUP) {
        for (uintptr_t at = uintptr_t(from + c), end = at + GROUP * sizeof(Bits); at < end; at += LINE)
          __builtin_prefetch(reinterpret_cast<const void*>(at + AHEAD));
        add(sums, from + c, &cols.top[j + c]);
      }
      if (c < width) {
        Bits filled[GROUP] = {};
        std::memcpy(filled, from + c, (width - c) * sizeof(Bits));
        add(sums, filled, &cols.top[j + c]);
      }
      Bits here = 0;
      for (int l = 0; l < int(WIDTH / sizeof(Bits)); ++l) here = here > sums.top[l] ? here : sums.top[l];
      double square = sums.s2.total();
      if (here >= least) row[r].count += count(from, width, &cols.count[j]);
      row[r].top = std::max(row[r].top, here);
      row[r].square += square;
      top = std::max(top, here);
      s2 += square;
    }
    double n = double(height * width);
    if (top >= T::INF) return {n, NAN, NAN, NAN, NAN};
    double mean = 0;
    if (in_range(magnitude(top))) {
      const Powers p{n, sums.s1.total(), s2, sums.s3.total(), sums.s4.total()};
      const Moments moments = Moments::about(0, p);
      if (precise(p, moments)) return moments;
      mean = moments.mean;
    }
    return in_double(x + (i * stride + j), height, width, mean);
  }

  // Whether the roundings to float32 can have moved the mean by TOLERANCE of a deviation at most, M2 and M4 by so much
  // of themselves, M3 by so much of n (M4/n)^(3/4). Bounds of the sums' errors, times the moments' derivatives by them.
  static bool precise(const Powers& p, const Moments& m) {
    const double n = m.n, c = std::abs(m.mean), fourth = m.m4 / n;
    const double e1 = T::ROUNDINGS.s1 * UNIT * std::sqrt(n * p.s2), e2 = T::ROUNDINGS.s2 * UNIT * p.s2;
    const double e3 = T::ROUNDINGS.s3 * UNIT * std::sqrt(p.s2 * p.s4), e4 = T::ROUNDINGS.s4 * UNIT * p.s4;
    return e1 <= TOLERANCE * std::sqrt(n * m.m2) && e2 + 2 * c * e1 <= TOLERANCE * m.m2 &&
           e3 + 3 * c * e2 + 3 * (m.m2 / n + c * c) * e1 <= TOLERANCE * n * std::sqrt(fourth * std::sqrt(fourth)) &&
           e4 + 4 * c * e3 + 6 * c * c * e2 + 4 * (std::abs(m.m3) / n + c * c * c) * e1 <= TOLERANCE * m.m4;
  }

  int32_t count(const Bits* from, int64_t n, int32_t* col_count) const {
    int32_t found = 0;
    for (int64_t j = 0; j < n; ++j) {
      int32_t one = is_outlier(from[j] & SIZE, least);
      found += one;
      col_count[j] += one;
    }
    return found;
  }

  // `origin` is near the mean, or at least a number; where it is not near enough there is a second try.
  Moments in_double(const Bits* from, int64_t height, int64_t width, double origin) const {
    Powers p = powers(from, height, width, origin);
    if (p.s1 * p.s1 > 0.1 * p.n * p.s2) p = powers(from, height, width, origin += p.s1 / p.n);
    return Moments::about(origin, p);
  }

  // Of the distances from `origin`, in double.
  Powers powers(const Bits* from, int64_t height, int64_t width, double origin) const {
    Eight s1, s2, s3, s4;
    const auto add = [&](const Eight64& distance) {
      for (int h = 0; h < STRANDS; ++h) {
        const F64 d = distance.v[h], square = d * d;
        s1.v[h] += d;
        s2.v[h] += square;
        s3.v[h] += square * d;
        s4.v[h] += square * square;
      }
    };
    for (int64_t r = 0; r < height; ++r) {
      const Bits* x = from + r * stride;
      int64_t j = 0;
      for (; j + 8 <= width; j += 8) {
        Eight64 distance = widen(T::eight(x + j));
        for (int h = 0; h < STRANDS; ++h) distance.v[h] -= origin;
        add(distance);
      }
      double rest[8] = {};
      for (int l = 0; j < width; ++l, ++j) rest[l] = double(T::value(x[j])) - origin;
      add(as<Eight64>(rest));
    }
    return {double(height * width), s1.total(), s2.total(), s3.total(), s4.total()};
  }

  void finish(int64_t i, const Row& row) const {
    const Bits* from = x + i * stride;
    const float absmax = magnitude(row.top);
    const double square = row.top >= T::INF ? absmax : in_range(absmax) ? row.square : powers(from, 1, columns, 0).s2;
    out.row_absmax[i] = absmax;
    out.row_l2[i] = float(std::sqrt(square));
    out.row_count[i] = row.count;
    if (!out.q) return;
    if (kept) quantize(i, nullptr, [from, kept = kept](int64_t j) -> Bits { return from[j] & kept[j]; });
    else if (row.count == 0) quantize(i, &row.top, All{from});
    else quantize(i, nullptr, [from, least = least](int64_t j) {
      return is_outlier(from[j] & SIZE, least) ? Bits(0) : from[j];
    });
  }

  struct All {
    const Bits* from;
    Bits operator()(int64_t j) const { return from[j]; }
  };

#ifdef VECTORS_256
  static void integers_of_32(const Bits* from, float factor, int8_t* q) {
    __m256i n[4];
    for (int k = 0; k < 4; ++k) n[k] = _mm256_cvtps_epi32((__m256)(T::eight(from + 8 * k) * factor));
    const __m256i quarters = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    const __m256i in_order = _mm256_permutevar8x32_epi32(quarters, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    std::memcpy(q, &in_order, sizeof in_order);
  }
#endif

  // `included` gives an element, or zero for one that is left out; `top` is the largest magnitude, where it is known.
  template <class Included> void quantize(int64_t i, const Bits* top, Included included) const {
    const int64_t n = columns;  // a store to q, being of bytes, might change what is read through `this`
    int8_t* const q = out.q + i * n;
    Bits largest = top ? *top : 0;
    for (int64_t j = 0; j < n && !top; ++j) largest = std::max<Bits>(largest, included(j) & SIZE);
    const float scale = magnitude(largest), factor = 127.0f / scale;
    out.row_scale[i] = scale;
    if (!(scale > 0 && scale < INFINITY)) std::memset(q, 0, n);
    else if (factor == INFINITY)  // a scale below 4e-37
      for (int64_t j = 0; j < n; ++j) q[j] = (included(j) & SIZE) == 0 ? 0 : included(j) < 0 ? -127 : 127;
    else {  // no clamp: a product exceeds 127 by a rounding at most
      int64_t j = 0;
#ifdef VECTORS_256
      if constexpr (std::is_same_v<Included, All>)
        for (; j + 32 <= n; j += 32) integers_of_32(included.from + j, factor, q + j);
#endif
      for (; j < n; ++j) q[j] = int8_t(as<int32_t>(T::value(included(j)) * factor + 0x1.8p23f));  // half to even
    }
  }

  Moments block(int64_t start, Columns& cols) const {
    const int64_t end = std::min(rows, start + block_rows);
    Moments moments;
    for (int64_t i = start; i < end; i += piece_rows) {
      const int64_t height = std::min(piece_rows, end - i);
      Row row[MOST_ROWS] = {};
      for (int64_t j = 0; j < columns; j += PIECE)
        moments.merge(piece(i, height, j, std::min(PIECE, columns - j), row, cols));
      for (int64_t r = 0; r < height; ++r) finish(i + r, row[r]);
    }
    return moments;
  }

  void run(int64_t threads) const {
    const int64_t blocks = (rows + block_rows - 1) / block_rows, padded = (columns + GROUP - 1) / GROUP * GROUP;
    threads = std::clamp<int64_t>(threads, 1, blocks);
    std::vector<Columns> cols(threads, {std::vector<Bits>(padded), std::vector<int32_t>(columns)});
    std::vector<Moments> moments(blocks);
    std::atomic<int64_t> next{0};
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t t = 0; t < threads; ++t)
      for (int64_t b; (b = next++) < blocks;) moments[b] = block(b * block_rows, cols[t]);
    for (int64_t j = 0; j < columns; ++j) {
      Bits top = 0;
      out.col_count[j] = 0;
      for (const Columns& share : cols) {
        top = std::max(top, share.top[j]);
        out.col_count[j] += share.count[j];
      }
      out.col_absmax[j] = magnitude(top);
    }
    for (int64_t b = 1; b < blocks; ++b) moments[0].merge(moments[b]);
    std::memcpy(out.moments, &moments[0], sizeof moments[0]);
  }
};

template <class T>
int outlier_stats(const void* x, int64_t rows, int64_t columns, int64_t stride, float threshold, const uint8_t* skip,
                  int64_t threads, const Outputs& out) try {
  using Bits = typename T::Bits;
  std::vector<Bits> kept;
  for (int64_t j = 0; skip && j < columns; ++j) kept.push_back(skip[j] ? 0 : -1);
#ifdef __linux__
  if (out.q && rows * columns >= LARGE) {  // fresh memory: faults of small pages would take most of the time
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t begin = (uintptr_t(out.q) + PAGE - 1) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(begin), uintptr_t(out.q) + rows * columns - begin, MADV_HUGEPAGE);
  }
#endif
  Kernel<T>{static_cast<const Bits*>(x), rows, columns, stride, Kernel<T>::least_outlier(threshold),
            skip ? kept.data() : nullptr, out}.run(threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // namespace

// `stride`: elements from row to row. `skip` (a byte a column), `q` and `row_scale` may be null. 1: memory is short.
#define EXPORT(NAME, T)                                                                                              \
  extern "C" int NAME(const void* x, int64_t rows, int64_t columns, int64_t stride, float threshold,                 \
                      const uint8_t* skip, int64_t threads, float* row_absmax, float* row_l2, int32_t* row_count,    \
                      float* col_absmax, int32_t* col_count, double* moments, int8_t* q, float* row_scale) {         \
    return outlier_stats<T>(x, rows, columns, stride, threshold, skip, threads,                                      \
                            {row_absmax, row_l2, row_count, col_absmax, col_count, moments, q, row_scale});          \
  }
EXPORT(outlier_stats_float32, Float32)
EXPORT(outlier_stats_bfloat16, BFloat16)
EXPORT(outlier_stats_float16, Float16)
