// Attention and group normalisation on a CPU, in fp32 and, where the processor multiplies it (AVX512-BF16), in bf16.
// src/native.py compiles this for the processor at hand, and says what the functions take. Sizes are counted in elements.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <omp.h>
#include <type_traits>
#include <utility>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using std::int64_t;

// A tile of ROWS queries by two vectors of keys fills the registers: 32 with AVX-512, 16 before.
#ifdef __AVX512F__
constexpr int64_t LANES = 16, ROWS = 8;
#else
constexpr int64_t LANES = 8, ROWS = 4;
#endif
constexpr int64_t BLOCK = 512;     // keys at once: their scores for ROWS queries stay in the first-level cache
constexpr int64_t MAX_WIDTH = 256;  // of a head
constexpr int64_t PIXELS = 64;      // whose sums are taken in single precision

using Floats = float __attribute__((vector_size(4 * LANES)));
using Ints = std::int32_t __attribute__((vector_size(4 * LANES)));

Floats all(float value) { return Floats{} + value; }

template <class Vector> Vector read(const void* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

template <class Vector> void write(void* to, Vector value) { std::memcpy(to, &value, sizeof value); }

// Of all lanes, by halves.
template <class Operation> float reduced(Floats x, Operation operation) {
    float lanes[LANES];
    write(lanes, x);
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] = operation(lanes[i], lanes[i + half]);
    return lanes[0];
}

// 2^x to a relative 2e-7: the whole part goes into the exponent, the rest through a polynomial. NaN stays NaN.
Floats exp2_of(Floats x) {
#ifdef __AVX512F__
    x = x < -200.0f ? all(-200.0f) : x;  // of minus infinity nothing would be left to take the fraction of
    const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    x = x < -126.0f ? all(-126.0f) : x > 127.0f ? all(127.0f) : x;
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no place for a fraction
    const Floats whole = (x + round) - round;
#endif
    const Floats part = x - whole;
    Floats sum = 0.00133909f * part + 0.00967603f;
    sum = sum * part + 0.05550357f;
    sum = sum * part + 0.24022107f;
    sum = sum * part + 0.6931472f;
    sum = sum * part + 1.0f;
#ifdef __AVX512F__
    return _mm512_scalef_ps(sum, whole);
#else
    return (Floats)((Ints)sum + (__builtin_convertvector(whole, Ints) << 23));
#endif
}

struct Float32 {
    using Element = float;
    static constexpr int64_t PACK = 1;  // elements that one multiplication sums up
    static Floats load(const Element* from) { return read<Floats>(from); }
    static void store(Element* to, Floats x) { write(to, x); }
    static Floats multiply_add(Floats sum, const Element* one, Floats many) { return sum + *one * many; }
    static Floats packed(const Element* from) { return read<Floats>(from); }
};

#ifdef __AVX512BF16__
struct BFloat16 {
    using Element = std::uint16_t;
    static constexpr int64_t PACK = 2;
    static Floats load(const Element* from) {
        return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16);
    }
    static void store(Element* to, Floats x) { write(to, _mm512_cvtneps_pbh(x)); }
    static Floats multiply_add(Floats sum, const Element* one, __m512bh many) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(read<std::int32_t>(one)), many);
    }
    static __m512bh packed(const Element* from) { return read<__m512bh>(from); }
};
#endif

struct Strides { int64_t batch, head, token; };

struct Sizes { int64_t batch, heads, queries, keys, width; };

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// How one head's keys and values lie for the products. Keys: [S / LANES][width / PACK][LANES][PACK], values:
// [S / PACK][padded width][PACK]; the keys are filled up with zeros to whole pairs of vectors.
template <class T> struct PackedHead {
    using Element = typename T::Element;
    int64_t keys, width, padded_keys, padded_width;

    PackedHead(int64_t keys, int64_t width)
        : keys(keys), width(width), padded_keys(rounded_up(keys, 2 * LANES)), padded_width(rounded_up(width, LANES)) {}

    int64_t size() const { return padded_keys * (width + padded_width); }

    void fill(Element* to, const Element* key, int64_t key_stride, const Element* value, int64_t value_stride) const {
        constexpr int64_t PACK = T::PACK;
        Element* const values = to + padded_keys * width;
        std::fill(to, to + size(), Element{});
        for (int64_t s = 0; s < keys; ++s) {
            Element* const group = to + s / LANES * LANES * width + s % LANES * PACK;
            Element* const row = values + s / PACK * padded_width * PACK + s % PACK;
            for (int64_t i = 0; i < width; ++i) {
                group[i / PACK * LANES * PACK + i % PACK] = key[s * key_stride + i];
                row[i * PACK] = value[s * value_stride + i];
            }
        }
    }
};

// What ROWS queries have come to: exp2(score - most) of all keys so far, summed, and weighing the values.
template <class T> struct Tile {
    using Element = typename T::Element;
    alignas(64) Element queries[ROWS * MAX_WIDTH] = {};
    alignas(64) float scores[ROWS * BLOCK];
    alignas(64) Element weights[ROWS * BLOCK];
    alignas(64) float result[ROWS * MAX_WIDTH] = {};
    float most[ROWS], sums[ROWS] = {};

    Tile() { std::fill(most, most + ROWS, -std::numeric_limits<float>::infinity()); }

    // Scores of two vectors of keys. Not inlined, as the next two: together they would need more registers than there are.
    [[gnu::noinline]] void score(const Element* keys, int64_t width, float* to) const {
        constexpr int64_t PACK = T::PACK;
        Floats sums[ROWS][2] = {};
        for (int64_t i = 0; i < width; i += PACK) {
            const auto left = T::packed(keys + i * LANES), right = T::packed(keys + (width + i) * LANES);
#pragma GCC unroll 8
            for (int64_t r = 0; r < ROWS; ++r) {
                sums[r][0] = T::multiply_add(sums[r][0], queries + r * width + i, left);
                sums[r][1] = T::multiply_add(sums[r][1], queries + r * width + i, right);
            }
        }
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; ++r) {
            write(to + r * BLOCK, sums[r][0]);
            write(to + r * BLOCK + LANES, sums[r][1]);
        }
    }

    // The scores of one row become weights; what the row has come to follows a new highest score.
    [[gnu::noinline]] void exponentiate(int64_t r, int64_t valid, int64_t count, float factor, int64_t width) {
        float* const row = scores + r * BLOCK;
        std::fill(row + valid, row + count, -std::numeric_limits<float>::infinity());  // weigh nothing
        Floats highest = all(most[r]);
        for (int64_t at = 0; at < count; at += LANES) {
            const Floats next = read<Floats>(row + at);
            highest = next > highest ? next : highest;
        }
        if (const float now = reduced(highest, [](float a, float b) { return std::max(a, b); }); now > most[r]) {
            const float shrink = std::exp2((most[r] - now) * factor);
            sums[r] *= shrink;
            for (int64_t at = 0; at < width; at += LANES) {
                write(result + r * width + at, read<Floats>(result + r * width + at) * shrink);
            }
            most[r] = now;
        }
        Floats sum{};
        for (int64_t at = 0; at < count; at += LANES) {
            const Floats weight = exp2_of((read<Floats>(row + at) - most[r]) * factor);
            sum += weight;
            T::store(weights + r * BLOCK + at, weight);
        }
        sums[r] += reduced(sum, std::plus<float>());
    }

    // Adds the values under their weights, N vectors of the width.
    template <int N> [[gnu::noinline]] void weigh(const Element* values, int64_t count, int64_t width, float* to) const {
        constexpr int64_t PACK = T::PACK;
        Floats sums[ROWS][N];
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) sums[r][n] = read<Floats>(to + r * width + n * LANES);
        for (int64_t s = 0; s < count; s += PACK) {
            decltype(T::packed(values)) many[N];
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) many[n] = T::packed(values + s * width + n * LANES * PACK);
#pragma GCC unroll 8
            for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
                for (int n = 0; n < N; ++n) sums[r][n] = T::multiply_add(sums[r][n], weights + r * BLOCK + s, many[n]);
        }
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; ++r)
#pragma GCC unroll 3
            for (int n = 0; n < N; ++n) write(to + r * width + n * LANES, sums[r][n]);
    }
};

// Attention of up to ROWS queries of one head, by blocks of keys with a running maximum (Dao et al. 2022, arXiv 2205.14135).
template <class T>
void attend_rows(const typename T::Element* query, int64_t query_stride, int64_t rows, const typename T::Element* packed,
                 const PackedHead<T>& sizes, float factor, typename T::Element* out, int64_t out_stride) {
    using Element = typename T::Element;
    const int64_t width = sizes.width, padded = sizes.padded_width;
    const Element* const values = packed + sizes.padded_keys * width;
    Tile<T> tile;
    for (int64_t r = 0; r < rows; ++r) std::copy_n(query + r * query_stride, width, tile.queries + r * width);
    for (int64_t start = 0; start < sizes.padded_keys; start += BLOCK) {
        const int64_t count = std::min(BLOCK, sizes.padded_keys - start), valid = std::min(count, sizes.keys - start);
        for (int64_t at = 0; at < count; at += 2 * LANES) tile.score(packed + (start + at) * width, width, tile.scores + at);
        for (int64_t r = 0; r < ROWS; ++r) tile.exponentiate(r, valid, count, factor, padded);
        for (int64_t at = 0; at < padded;) {
            const int64_t left = (padded - at) / LANES;
            const Element* const from = values + start * padded + at * T::PACK;
            if (left == 3 || left > 4) tile.template weigh<3>(from, count, padded, tile.result + at), at += 3 * LANES;
            else if (left != 1) tile.template weigh<2>(from, count, padded, tile.result + at), at += 2 * LANES;
            else tile.template weigh<1>(from, count, padded, tile.result + at), at += LANES;
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t at = 0; at < width; at += LANES) {
            Element vector[LANES];
            T::store(vector, read<Floats>(tile.result + r * padded + at) / tile.sums[r]);
            std::copy_n(vector, std::min(LANES, width - at), out + r * out_stride + at);
        }
    }
}

template <class T>
int attend(const void* query, const void* key, const void* value, void* out, const Strides* strides, const Sizes& sizes) {
    using Element = typename T::Element;
    const Strides &of_query = strides[0], &of_key = strides[1], &of_value = strides[2], &of_out = strides[3];
    const auto at = [&](auto* base, const Strides& by, int64_t head) {
        using Same = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(base)>>, const Element, Element>;
        return static_cast<Same*>(base) + head / sizes.heads * by.batch + head % sizes.heads * by.head;
    };
    const PackedHead<T> packed(sizes.keys, sizes.width);
    const int64_t heads = sizes.batch * sizes.heads, head_bytes = rounded_up(packed.size() * sizeof(Element), 64);
    auto* const storage = static_cast<unsigned char*>(std::aligned_alloc(64, heads * head_bytes));
    if (storage == nullptr) return 1;
    const auto of_head = [&](int64_t head) { return reinterpret_cast<Element*>(storage + head * head_bytes); };
    const float factor = static_cast<float>(std::log2(std::exp(1.0)) / std::sqrt(static_cast<double>(sizes.width)));
    const int64_t tiles = (sizes.queries + ROWS - 1) / ROWS;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t head = 0; head < heads; ++head) {
            packed.fill(of_head(head), at(key, of_key, head), of_key.token, at(value, of_value, head), of_value.token);
        }
#pragma omp for schedule(static)
        for (int64_t work = 0; work < heads * tiles; ++work) {
            const int64_t head = work / tiles, row = work % tiles * ROWS;
            attend_rows<T>(at(query, of_query, head) + row * of_query.token, of_query.token, std::min(ROWS, sizes.queries - row),
                           of_head(head), packed, factor, at(out, of_out, head) + row * of_out.token, of_out.token);
        }
    }
    std::free(storage);
    return 0;
}

struct Norm { int64_t batch, pixels, channels, groups; double epsilon; int64_t with_silu; };

// Sums of a channel vector over some pixels, in single precision.
template <class T> std::pair<Floats, Floats> sums_of(const typename T::Element* x, int64_t pixels, int64_t channels) {
    Floats sum{}, squares{};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        const Floats value = T::load(x + pixel * channels);
        sum += value;
        squares += value * value;
    }
    return {sum, squares};
}

// What each channel of one picture is multiplied by and what is added, from its sums and sums of squares over the pixels.
// Parameters: weight, bias, shift of what comes, and what the result is scaled (plus 1) and shifted by; any may be missing.
template <class T>
void scales_of(const Norm& norm, const double* sums, const double* squares, const typename T::Element* const parameters[5],
               float* scale, float* offset) {
    const auto number = [](const typename T::Element* from, int64_t i) {
        if (from == nullptr) return 0.0f;
        if constexpr (sizeof *from == 4) {
            return from[i];
        } else {
            const std::uint32_t bits = static_cast<std::uint32_t>(from[i]) << 16;
            return read<float>(&bits);
        }
    };
    const auto *const weight = parameters[0], *const bias = parameters[1], *const shift = parameters[2];
    const int64_t size = norm.channels / norm.groups;
    for (int64_t group = 0; group < norm.groups; ++group) {
        double sum = 0, square = 0;
        for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            const double by = number(shift, c);
            sum += sums[c] + by * norm.pixels;
            square += squares[c] + 2 * by * sums[c] + by * by * norm.pixels;
        }
        const double mean = sum / (size * norm.pixels), variance = square / (size * norm.pixels) - mean * mean;
        const double inverse = 1 / std::sqrt(std::max(variance, 0.0) + norm.epsilon);
        for (int64_t c = group * size; c < (group + 1) * size; ++c) {
            const double by = number(weight, c) * inverse, then = 1.0 + number(parameters[3], c);
            scale[c] = static_cast<float>(by * then);
            offset[c] = static_cast<float>(((number(shift, c) - mean) * by + number(bias, c)) * then + number(parameters[4], c));
        }
    }
}

template <class T>
int normalize(const void* x, void* out, const void* weight, const void* bias, const void* shift, const void* modulation,
              const Norm& norm) {
    using Element = typename T::Element;
    const int64_t channels = norm.channels, threads = omp_get_max_threads();
    const std::unique_ptr<double[]> partial(new (std::nothrow) double[threads * channels * 2]);
    const std::unique_ptr<double[]> totals(new (std::nothrow) double[threads * channels * 2]);
    const std::unique_ptr<float[]> scales(new (std::nothrow) float[threads * channels * 2]);
    if (!partial || !totals || !scales) return 1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t first = norm.pixels * thread / team, last = norm.pixels * (thread + 1) / team;
        double* const mine = partial.get() + thread * channels * 2;
        float* const scale = scales.get() + thread * channels * 2;
        for (int64_t picture = 0; picture < norm.batch; ++picture) {
            const Element* const from = static_cast<const Element*>(x) + picture * norm.pixels * channels;
            Element* const to = static_cast<Element*>(out) + picture * norm.pixels * channels;
            std::fill(mine, mine + channels * 2, 0.0);
            for (int64_t pixel = first; pixel < last; pixel += PIXELS) {
                for (int64_t c = 0; c < channels; c += LANES) {
                    const auto [sum, squares] = sums_of<T>(from + pixel * channels + c, std::min(PIXELS, last - pixel), channels);
                    for (int64_t i = 0; i < LANES; ++i) mine[c + i] += sum[i], mine[channels + c + i] += squares[i];
                }
            }
#pragma omp barrier
            double* const sums = totals.get() + thread * channels * 2;
            std::fill(sums, sums + channels * 2, 0.0);
            for (int64_t other = 0; other < team; ++other) {
                for (int64_t i = 0; i < channels * 2; ++i) sums[i] += partial[other * channels * 2 + i];
            }
#pragma omp barrier  // before anybody's sums are those of the next picture
            const Element* const by = shift ? static_cast<const Element*>(shift) + picture * channels : nullptr;
            const Element* const then = modulation ? static_cast<const Element*>(modulation) + picture * channels * 2 : nullptr;
            const Element* const parameters[] = {static_cast<const Element*>(weight), static_cast<const Element*>(bias), by,
                                                 then, then ? then + channels : nullptr};
            scales_of<T>(norm, sums, sums + channels, parameters, scale, scale + channels);
            for (int64_t pixel = first; pixel < last; ++pixel) {
                for (int64_t c = 0; c < channels; c += LANES) {
                    const int64_t i = pixel * channels + c;
                    Floats y = T::load(from + i) * read<Floats>(scale + c) + read<Floats>(scale + channels + c);
                    if (norm.with_silu) y = y / (1.0f + exp2_of(y * -1.44269504f));
                    T::store(to + i, y);
                }
            }
        }
    }
    return 0;
}

}  // namespace

extern "C" {

int knows_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

int attend_fp32(const void* q, const void* k, const void* v, void* out, const Strides* strides, const Sizes* sizes) {
    return attend<Float32>(q, k, v, out, strides, *sizes);
}

int normalize_fp32(const void* x, void* out, const void* weight, const void* bias, const void* shift, const void* modulation,
                   const Norm* norm) {
    return normalize<Float32>(x, out, weight, bias, shift, modulation, *norm);
}

#ifdef __AVX512BF16__
int attend_bf16(const void* q, const void* k, const void* v, void* out, const Strides* strides, const Sizes* sizes) {
    return attend<BFloat16>(q, k, v, out, strides, *sizes);
}

int normalize_bf16(const void* x, void* out, const void* weight, const void* bias, const void* shift, const void* modulation,
                   const Norm* norm) {
    return normalize<BFloat16>(x, out, weight, bias, shift, modulation, *norm);
}
#endif
}
