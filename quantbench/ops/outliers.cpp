// quantbench::outlier_stats on a CPU: every statistic of x [rows, columns] in one pass over memory.
//
// What is exact is done on the bits: without its sign a float orders like the integer it is stored as, and NaN comes
// above infinity. So a maximum needs no conversion and lets NaN through, and a threshold is the smallest bit pattern
// that is not below it. The powers of 4,096 elements at a time are summed in float32 lanes (the squares after Kahan,
// which keeps the norms exact to a rounding) and become moments about their own mean, in double. Where float32 does not
// do, because that mean is more than 1.2 standard deviations or a fourth power may leave the range, these elements are
// read again, in double, while they are in the cache.
//
// Blocks of rows are fixed by the shape and merged in order: the number of threads changes no bit of any result.
// Written with the vectors that g++ and clang++ share. -ffast-math would undo Kahan and the treatment of NaN.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512BW__)
constexpr int WIDTH = 64;  // bytes of a vector
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
typedef float F32 __attribute__((vector_size(WIDTH)));
typedef int32_t I32 __attribute__((vector_size(WIDTH)));
typedef int16_t I16 __attribute__((vector_size(WIDTH)));

constexpr int LANES = WIDTH / 4, CHUNK = 4 * LANES;  // floats of a vector; elements in registers at once
constexpr int64_t PIECE = 4096;                      // elements whose powers are summed in float32
constexpr int64_t MOST_ROWS = 64;                    // of a piece, where rows are short
constexpr int64_t BLOCK = 1 << 16;                   // elements, about, of the rows that a thread takes at once
constexpr int64_t LARGE = 1 << 23;                   // bytes of q from which large memory pages are asked for

template <class To, class From> To as(From from) {
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

struct Float32 {
  using Bits = int32_t;
  using Vector = I32;
  static constexpr Bits INF = 0x7f800000;
  static float value(Bits bits) { return as<float>(bits); }
  static void unpack(I32 bits, F32* parts) { parts[0] = as<F32>(bits); }
};

// A 32-bit lane holds two: all the low halves come first, then the high ones, as no sum minds the order.
template <class Format> struct Half {
  using Bits = int16_t;
  using Vector = I16;
  static float value(Bits bits) { return Format::template widen<float>(int32_t(uint32_t(uint16_t(bits)) << 16)); }
  static void unpack(I16 bits, F32* parts) {
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
};

double total(F32 v, F32 minus = F32{}) {
  double lanes[LANES], sum = 0;
  for (int l = 0; l < LANES; ++l) lanes[l] = double(v[l]) - double(minus[l]);
  for (int l = 0; l < LANES; ++l) sum += lanes[l];
  return sum;
}

// The moments of n elements: their mean, and sums of powers of the distance from it.
struct Moments {
  double n = 0, mean = 0, m2 = 0, m3 = 0, m4 = 0;

  static Moments of_sums(double n, double s1, double s2, double s3, double s4) {
    double m = s1 / n;
    return {n, m, s2 - m * s1, s3 - m * (3 * s2 - 2 * m * s1), s4 - m * (4 * s3 - m * (6 * s2 - 3 * m * s1))};
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
    F32 s1{}, s2{}, lost{}, s3[2]{}, s4[2]{};
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

  // CHUNK elements; zeros may fill it up.
  static void add(Sums& sums, const Bits* x, Bits* col_top) {
    constexpr int STEP = WIDTH / sizeof(Bits), PARTS = STEP / LANES;
    F32 v[4], square[4];
    for (int i = 0; i < 4 / PARTS; ++i) {
      Vector bits = load<Vector>(x + i * STEP), col = load<Vector>(col_top + i * STEP), size = bits & SIZE;
      sums.top = sums.top > size ? sums.top : size;
      col = col > size ? col : size;
      std::memcpy(col_top + i * STEP, &col, sizeof col);
      T::unpack(bits, v + i * PARTS);
    }
    for (int k = 0; k < 4; ++k) square[k] = v[k] * v[k];
    sums.s1 += (v[0] + v[1]) + (v[2] + v[3]);
    F32 more = (square[0] + square[1]) + (square[2] + square[3]) - sums.lost, s2 = sums.s2 + more;
    sums.lost = (s2 - sums.s2) - more;
    sums.s2 = s2;
    for (int k = 0; k < 4; ++k) sums.s3[k & 1] += square[k] * v[k];
    for (int k = 0; k < 4; ++k) sums.s4[k & 1] += square[k] * square[k];
  }

  // Elements [i, i + height) x [j, j + width) of x: their moments, and what they add to their rows and columns.
  Moments piece(int64_t i, int64_t height, int64_t j, int64_t width, Row* row, Columns& cols) const {
    Sums sums;
    Bits top = 0;
    double s2 = 0;
    for (int64_t r = 0; r < height; ++r) {
      const Bits* from = x + (i + r) * stride + j;
      sums.top = Vector{};
      sums.s2 = sums.lost = F32{};
      int64_t c = 0;
      for (; c + CHUNK <= width; c += CHUNK) add(sums, from + c, &cols.top[j + c]);
      if (c < width) {
        Bits filled[CHUNK] = {};
        std::memcpy(filled, from + c, (width - c) * sizeof(Bits));
        add(sums, filled, &cols.top[j + c]);
      }
      Bits here = 0;
      for (int l = 0; l < int(WIDTH / sizeof(Bits)); ++l) here = here > sums.top[l] ? here : sums.top[l];
      double square = total(sums.s2, sums.lost);
      if (here >= least) row[r].count += count(from, width, &cols.count[j]);
      row[r].top = std::max(row[r].top, here);
      row[r].square += square;
      top = std::max(top, here);
      s2 += square;
    }
    double n = double(height * width), s1 = total(sums.s1);
    if (top >= T::INF) return {n, NAN, NAN, NAN, NAN};
    if (!in_range(magnitude(top)) || s1 * s1 > 0.6 * n * s2) return in_double(x + i * stride + j, height, width);
    return Moments::of_sums(n, s1, s2, total(sums.s3[0] + sums.s3[1]), total(sums.s4[0] + sums.s4[1]));
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

  Moments in_double(const Bits* from, int64_t height, int64_t width) const {
    double n = double(height * width), sum = 0, m2 = 0, m3 = 0, m4 = 0;
    for (int64_t r = 0; r < height; ++r)
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) sum += double(T::value(from[r * stride + j]));
    const double mean = sum / n;
    for (int64_t r = 0; r < height; ++r)
#pragma omp simd reduction(+ : m2, m3, m4)
      for (int64_t j = 0; j < width; ++j) {
        double d = double(T::value(from[r * stride + j])) - mean, square = d * d;
        m2 += square;
        m3 += square * d;
        m4 += square * square;
      }
    return {n, mean, m2, m3, m4};
  }

  double squares(const Bits* from) const {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; ++j) sum += double(T::value(from[j])) * double(T::value(from[j]));
    return sum;
  }

  void finish(int64_t i, const Row& row) const {
    const Bits* from = x + i * stride;
    const float absmax = magnitude(row.top);
    const double square = row.top >= T::INF ? absmax : in_range(absmax) ? row.square : squares(from);
    out.row_absmax[i] = absmax;
    out.row_l2[i] = float(std::sqrt(square));
    out.row_count[i] = row.count;
    if (!out.q) return;
    if (kept) quantize(i, nullptr, [from, kept = kept](int64_t j) -> Bits { return from[j] & kept[j]; });
    else if (row.count == 0) quantize(i, &row.top, [from](int64_t j) { return from[j]; });
    else quantize(i, nullptr, [from, least = least](int64_t j) {
      return is_outlier(from[j] & SIZE, least) ? Bits(0) : from[j];
    });
  }

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
    else  // no clamp: a product exceeds 127 by a rounding at most
      for (int64_t j = 0; j < n; ++j) q[j] = int8_t(int32_t(__builtin_rintf(T::value(included(j)) * factor)));
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
    const int64_t blocks = (rows + block_rows - 1) / block_rows, padded = (columns + CHUNK - 1) / CHUNK * CHUNK;
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
