/* The loader's work on each cell: genes drawn, masked and looked up (draw_cells), and a batch packed and sorted (pack_cells).

   The same bits as the NumPy code of scbench.data.sampling, .values and .batch, on every machine: integers, and doubles that
   meet + - * / only (compile with -ffp-contract=off). Nothing is allocated here, and every index was checked in Python. */

#include <stdint.h>
#include <string.h>

#define GOLDEN 0x9E3779B97F4A7C15u
#define WEIGHT_FLOOR 1e-5
#define TABLE 65536     /* counts whose logarithms are looked up */
#define BUCKET_BITS 10  /* of a step of the selection */
#define DIGIT_BITS 11   /* of a step of the sort, at most */

static inline uint64_t word(uint64_t key, uint64_t counter) { /* kernels.random.bits */
    uint64_t z = (counter + 1) * GOLDEN + key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static inline double as_double(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline uint64_t as_bits(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }

static inline double logarithm(double x) { /* kernels.logarithm.log */
    uint64_t bits = as_bits(x);
    int64_t shifted = (int64_t)(bits - 0x3FE6A09E667F3BCDu);
    double k = (double)(shifted >> 52);
    double f = as_double(bits - ((uint64_t)shifted & 0xFFF0000000000000u)) - 1.0;
    double s = f / (2.0 + f);
    double z = s * s;
    double w = z * z;
    double odd = z * (0x1.5555555555593p-1 + w * (0x1.2492494229359p-2 + w * (0x1.7466496cb03dep-3 + w * 0x1.2f112df3e5244p-3)));
    double even = w * (0x1.999999997fa04p-2 + w * (0x1.c71c51d8e78afp-3 + w * 0x1.39a09d078c69fp-3));
    double half = 0.5 * f * f;
    return k * 0x1.62e42feep-1 - ((half - (s * (half + (even + odd)) + k * 0x1.a39ef35793c76p-33)) - f);
}

static void widen(uint32_t *to, const void *from, int64_t bytes, int64_t n) {
    if (bytes == 1)
        for (int64_t i = 0; i < n; i++) to[i] = ((const uint8_t *)from)[i];
    else if (bytes == 2)
        for (int64_t i = 0; i < n; i++) to[i] = ((const uint16_t *)from)[i];
    else
        memcpy(to, from, 4 * n);
}

/* The number-th smallest of n words, number >= 1; `some` has room for n. By buckets of equal width between the least and the
   greatest, then inside the bucket that holds it: each step but the last leaves a 2^BUCKET_BITS-th of the range. */
static uint64_t select_word(const uint64_t *words, int64_t n, int64_t number, uint64_t *some) {
    for (;;) {
        uint64_t least = UINT64_MAX, greatest = 0;
        for (int64_t i = 0; i < n; i++) {
            least = words[i] < least ? words[i] : least;
            greatest = words[i] > greatest ? words[i] : greatest;
        }
        if (least == greatest) return least;
        int width = 64 - __builtin_clzll(greatest - least) - BUCKET_BITS;
        int shift = width > 0 ? width : 0;
        uint32_t filled[1 << BUCKET_BITS] = {0};
        for (int64_t i = 0; i < n; i++) filled[(words[i] - least) >> shift]++;
        uint64_t bucket = 0;
        while (number > filled[bucket]) number -= filled[bucket++];
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) {
            uint64_t own = words[i];
            some[kept] = own;
            kept += (own - least) >> shift == bucket;
        }
        words = some, n = kept;
    }
}

/* The positions of the `number` smallest of n words, ascending; the first ones of equal words win. */
static void smallest(const uint64_t *words, int64_t n, int64_t number, uint64_t *some, uint32_t *positions) {
    uint64_t last = select_word(words, n, number, some);
    int64_t kept = 0, below = 0;
    for (int64_t i = 0; i < n; i++) {
        positions[kept] = (uint32_t)i;
        kept += words[i] <= last;
    }
    if (kept == number) return;
    for (int64_t i = 0; i < n; i++) below += words[i] < last;
    int64_t equal = number - below;
    kept = 0;
    for (int64_t i = 0; i < n && kept < number; i++) {
        positions[kept] = (uint32_t)i;
        if (words[i] < last) kept++;
        else if (words[i] == last && equal > 0) kept++, equal--;
    }
}

/* Exponential clocks -ln(u) / w in place of words; positive doubles are in the order of their bits. `weights` has room for n. */
static void to_clocks(uint64_t *words, const uint32_t *counts, int64_t n, const double *log1p, double *weights) {
    uint32_t least = UINT32_MAX, greatest = 0;
    for (int64_t i = 0; i < n; i++) {
        least = counts[i] < least ? counts[i] : least;
        greatest = counts[i] > greatest ? counts[i] : greatest;
    }
    if (greatest < TABLE)
        for (int64_t i = 0; i < n; i++) weights[i] = log1p[counts[i]];
    else
        for (int64_t i = 0; i < n; i++) weights[i] = logarithm(1.0 + counts[i]);
    double lowest = least < TABLE ? log1p[least] : logarithm(1.0 + least);
    for (int64_t i = 0; i < n; i++) {
        double uniform = ((double)(int64_t)(words[i] >> 12) + 0.5) * 0x1p-52;
        words[i] = as_bits(-logarithm(uniform) / (weights[i] - lowest + WEIGHT_FLOOR));
    }
}

/* Arrays of cells: where genes, counts and int64 offsets lie, and the bytes of a gene and of a count. */
struct piece {
    const char *genes, *counts;
    const int64_t *offsets;
    int64_t gene_bytes, count_bytes;
};

void cell_lengths(const struct piece *pieces, const int64_t *piece_of, const int64_t *indices, int64_t n_cells, int64_t *lengths) {
    for (int64_t cell = 0; cell < n_cells; cell++) {
        const int64_t *offsets = pieces[piece_of[cell]].offsets + indices[cell];
        lengths[cell] = offsets[1] - offsets[0];
    }
}

/* Cell i is number indices[i] of piece piece_of[i]; what is kept of it goes to offsets[i] of genes, counts, values, masked and
   positions (in the cell). `scratch` holds 28 bytes for each gene of the longest cell. */
void draw_cells(const struct piece *pieces, const int64_t *piece_of, const int64_t *indices, int64_t n_cells, int64_t longest,
                const uint64_t *subset_keys, const uint8_t *by_weight, const uint64_t *mask_keys, uint64_t mask_threshold,
                const double *log1p, const int64_t *offsets, char *scratch,
                uint32_t *genes, uint32_t *counts, float *values, uint8_t *masked, int32_t *positions, int64_t *totals) {
    uint64_t *words = (uint64_t *)scratch, *some = words + longest;
    uint32_t *cell_genes = (uint32_t *)(some + longest), *cell_counts = cell_genes + longest, *kept = cell_counts + longest;
    for (int64_t cell = 0; cell < n_cells; cell++) {
        const struct piece *piece = pieces + piece_of[cell];
        int64_t start = piece->offsets[indices[cell]], n = piece->offsets[indices[cell] + 1] - start;
        int64_t first = offsets[cell], number = offsets[cell + 1] - first;
        widen(cell_genes, piece->genes + start * piece->gene_bytes, piece->gene_bytes, n);
        widen(cell_counts, piece->counts + start * piece->count_bytes, piece->count_bytes, n);
        uint64_t total = 0;
        for (int64_t i = 0; i < n; i++) total += cell_counts[i];
        totals[cell] = (int64_t)total;
        if (number < n) {
            for (int64_t i = 0; i < n; i++) words[i] = word(subset_keys[cell], cell_genes[i]);
            if (by_weight[cell]) to_clocks(words, cell_counts, n, log1p, (double *)some);
            smallest(words, n, number, some, kept);
        } else {
            for (int64_t i = 0; i < n; i++) kept[i] = (uint32_t)i;
        }
        for (int64_t i = 0; i < number; i++) {
            uint32_t count = cell_counts[kept[i]];
            positions[first + i] = (int32_t)kept[i];
            genes[first + i] = cell_genes[kept[i]];
            counts[first + i] = count;
            values[first + i] = (float)(count < TABLE ? log1p[count] : logarithm(1.0 + count));
        }
        for (int64_t i = 0; i < number; i++) masked[first + i] = word(mask_keys[cell], genes[first + i]) >> 32 < mask_threshold;
    }
}

/* order = the stable sort of 0 .. n-1 by gene; `a` and `b` have room for n pairs (gene, position). Least digits first. */
static void sort_positions(const int32_t *genes, int64_t n, int32_t *order, uint64_t *a, uint64_t *b) {
    int32_t least = INT32_MAX, greatest = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        least = genes[i] < least ? genes[i] : least;
        greatest = genes[i] > greatest ? genes[i] : greatest;
    }
    int bits = n && greatest > least ? 32 - __builtin_clz((uint32_t)greatest - (uint32_t)least) : 1;
    int steps = (bits + DIGIT_BITS - 1) / DIGIT_BITS, width = (bits + steps - 1) / steps;
    uint64_t low = ((uint64_t)1 << width) - 1;
    uint32_t places[3][1 << DIGIT_BITS];
    for (int step = 0; step < steps; step++) {
        uint32_t *place = places[step], before = 0;
        memset(place, 0, sizeof places[step]);
        for (int64_t i = 0; i < n; i++) place[((uint32_t)genes[i] - (uint32_t)least) >> step * width & low]++;
        for (uint64_t digit = 0; digit <= low; digit++) {
            uint32_t here = place[digit];
            place[digit] = before;
            before += here;
        }
    }
    for (int step = 0; step < steps; step++) {
        uint32_t *place = places[step];
        for (int64_t i = 0; i < n; i++) {
            uint64_t pair = step ? a[i] : (uint64_t)((uint32_t)genes[i] - (uint32_t)least) << 32 | (uint64_t)i;
            uint32_t to = place[pair >> (32 + step * width) & low]++;
            if (step < steps - 1) b[to] = pair;
            else order[to] = (int32_t)(uint32_t)pair;
        }
        uint64_t *swap = a;
        a = b, b = swap;
    }
}

/* How many of the cells' genes are masked. */
int64_t count_masked(const uint8_t *masked, const int64_t *starts, const int64_t *lengths, int64_t n_cells) {
    int64_t sum = 0;
    for (int64_t cell = 0; cell < n_cells; cell++)
        for (int64_t i = 0; i < lengths[cell]; i++) sum += masked[starts[cell] + i] != 0;
    return sum;
}

/* CellBatch.pack: cell i is lengths[i] genes from starts[i] on, and gets the tokens from token_offsets[i] on. `scratch` holds
   24 bytes for each token. Returns the number of query_genes, which have room for all masked ones.
   A list is made by writing at its end always, and moving the end only if it was meant: no branch that can't be foreseen. */
int64_t pack_cells(const uint32_t *genes, const uint32_t *counts, const float *values, const uint8_t *masked,
                   const int64_t *starts, const int64_t *lengths, int64_t n_cells, const int64_t *token_offsets,
                   int32_t cls_token, int32_t pad_token, float masked_value, char *scratch,
                   int32_t *out_genes, float *out_values, int32_t *out_masked, float *targets, int64_t *target_counts,
                   int32_t *query_genes, int32_t *query_index, int32_t *query_order, int32_t *gene_order) {
    int64_t n_tokens = token_offsets[n_cells], n_masked = 0;
    uint64_t *a = (uint64_t *)scratch, *b = a + n_tokens;
    int32_t *number_of = (int32_t *)(b + n_tokens); /* of a masked token among them; else -1 */
    int32_t *list = number_of + n_tokens;
    for (int64_t cell = 0; cell < n_cells; cell++) {
        int64_t token = token_offsets[cell], end = token_offsets[cell + 1], start = starts[cell], n = lengths[cell];
        out_genes[token] = cls_token, out_values[token] = 0;
        token++;
        for (int64_t i = 0; i < n; i++) out_genes[token + i] = (int32_t)genes[start + i];
        for (int64_t i = 0; i < n; i++) out_values[token + i] = masked[start + i] ? masked_value : values[start + i];
        int64_t hidden = 0;
        for (int64_t i = 0; i < n; i++) {
            list[hidden] = (int32_t)i;
            hidden += masked[start + i];
        }
        for (int64_t i = 0; i < hidden; i++, n_masked++) {
            out_masked[n_masked] = (int32_t)token + list[i];
            targets[n_masked] = values[start + list[i]];
            target_counts[n_masked] = counts[start + list[i]];
        }
        for (token += n; token < end; token++) out_genes[token] = pad_token, out_values[token] = 0;
    }
    sort_positions(out_genes, n_tokens, gene_order, a, b);
    for (int64_t i = 0; i < n_tokens; i++) number_of[i] = -1;
    for (int64_t i = 0; i < n_masked; i++) number_of[out_masked[i]] = (int32_t)i;
    int64_t found = 0, n_queries = 0;
    for (int64_t i = 0; i < n_tokens; i++) {
        list[found] = number_of[gene_order[i]];
        found += list[found] >= 0;
    }
    memcpy(query_order, list, (size_t)n_masked * sizeof *list);
    int64_t last = INT64_MIN;
    for (int64_t i = 0; i < n_masked; i++) {
        int32_t number = query_order[i], gene = out_genes[out_masked[number]];
        n_queries += gene != last;
        last = gene;
        query_genes[n_queries - 1] = gene;
        query_index[number] = (int32_t)(n_queries - 1);
    }
    return n_queries;
}
