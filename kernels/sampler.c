/* The loader's work on each cell: genes drawn, masked and looked up (draw_cells), and a batch packed and sorted (pack_cells),
   or both in one pass (make_batch).

   The same bits as the NumPy code of scbench.data.sampling, .values and .batch, on every machine: integers, and doubles that
   meet + - * / only (compile with -ffp-contract=off). Nothing is allocated here. Every index was checked, in Python or by
   cell_lengths. */

#include <stdint.h>
#include <string.h>
#ifdef __AVX512VL__
#include <immintrin.h>
#endif

#define GOLDEN 0x9E3779B97F4A7C15u
#define WEIGHT_FLOOR 1e-5
#define TABLE 65536     /* counts whose logarithms are looked up */
#define BUCKET_BITS 10  /* of a step of the selection, at most */
#define FEW 32          /* words that are selected from without such a step */
#define FETCHED 12      /* lines of the next cell's genes, and of its counts, that a step of drawing fetches */
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

/* Those of n words that are from `low` to low + span, in their order, to `some`; their number. `some` may be `words`. */
static int64_t keep_words(const uint64_t *words, int64_t n, uint64_t low, uint64_t span, uint64_t *some) {
    int64_t i = 0, kept = 0;
#ifdef __AVX512VL__
    for (; i + 8 <= n; i += 8) {
        __m512i own = _mm512_loadu_si512(words + i);
        __mmask8 meant = _mm512_cmple_epu64_mask(_mm512_sub_epi64(own, _mm512_set1_epi64((long long)low)),
                                                 _mm512_set1_epi64((long long)span));
        _mm512_storeu_si512(some + kept, _mm512_maskz_compress_epi64(meant, own));
        kept += __builtin_popcount(meant);
    }
#endif
    for (; i < n; i++) {
        uint64_t own = words[i];
        some[kept] = own;
        kept += own - low <= span;
    }
    return kept;
}

/* The positions of those of n words that are at most `last`; their number. `positions` has room for n. */
static int64_t keep_positions(const uint64_t *words, int64_t n, uint64_t last, uint32_t *positions) {
    int64_t i = 0, kept = 0;
#ifdef __AVX512VL__
    __m256i own = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    for (; i + 8 <= n; i += 8, own = _mm256_add_epi32(own, _mm256_set1_epi32(8))) {
        __mmask8 meant = _mm512_cmple_epu64_mask(_mm512_loadu_si512(words + i), _mm512_set1_epi64((long long)last));
        _mm256_storeu_si256((__m256i *)(positions + kept), _mm256_maskz_compress_epi32(meant, own));
        kept += __builtin_popcount(meant);
    }
#endif
    for (; i < n; i++) {
        positions[kept] = (uint32_t)i;
        kept += words[i] <= last;
    }
    return kept;
}

/* The number-th smallest of n words, number >= 1; `some` has room for n. By buckets of equal width between the least and the
   greatest, then inside the bucket that holds it; a few words are counted out. */
static uint64_t select_word(const uint64_t *words, int64_t n, int64_t number, uint64_t *some) {
    while (n > FEW) {
        uint64_t least = UINT64_MAX, greatest = 0;
        for (int64_t i = 0; i < n; i++) {
            least = words[i] < least ? words[i] : least;
            greatest = words[i] > greatest ? words[i] : greatest;
        }
        if (least == greatest) return least;
        int wanted = 63 - __builtin_clzll((uint64_t)n) - 2; /* about four words each, if they are uniform */
        int bits = wanted < BUCKET_BITS ? wanted : BUCKET_BITS;
        int width = 64 - __builtin_clzll(greatest - least) - bits;
        int shift = width > 0 ? width : 0;
        uint32_t filled[1 << BUCKET_BITS];
        memset(filled, 0, sizeof *filled << bits);
        for (int64_t i = 0; i < n; i++) filled[(words[i] - least) >> shift]++;
        uint64_t bucket = 0;
        while (number > filled[bucket]) number -= filled[bucket++];
        n = keep_words(words, n, least + (bucket << shift), ((uint64_t)1 << shift) - 1, some);
        words = some;
    }
    for (int64_t i = 0;; i++) {
        int64_t below = 0, equal = 0;
        for (int64_t j = 0; j < n; j++) below += words[j] < words[i];
        for (int64_t j = 0; j < n; j++) equal += words[j] == words[i];
        if (below < number && number <= below + equal) return words[i];
    }
}

/* The same of words that are uniform, number < n: where it should be there are few, and it seldom is elsewhere. */
static uint64_t select_uniform(const uint64_t *words, int64_t n, int64_t number, uint64_t *some) {
    if (n <= FEW) return select_word(words, n, number, some);
    uint64_t about = (uint64_t)((double)number / (double)n * 0x1p64);
    int root = (63 - __builtin_clzll((uint64_t)n)) / 2;
    uint64_t half = (uint64_t)3 << (63 - root); /* at least 1.5 / sqrt(n) of all words: three deviations of its place */
    uint64_t low = about > half ? about - half : 0, high = about < UINT64_MAX - half ? about + half : UINT64_MAX;
    int64_t below = 0, kept = keep_words(words, n, low, high - low, some);
    for (int64_t i = 0; i < n; i++) below += words[i] < low;
    if (number <= below || number > below + kept) return select_word(words, n, number, some);
    return select_word(some, kept, number - below, some);
}

/* The positions of the `number` smallest of n words, ascending, `last` being the greatest; the first of equal words win. */
static void smallest(const uint64_t *words, int64_t n, int64_t number, uint64_t last, uint32_t *positions) {
    if (keep_positions(words, n, last, positions) == number) return;
    int64_t kept = 0, below = 0;
    for (int64_t i = 0; i < n; i++) below += words[i] < last;
    int64_t equal = number - below;
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
    int64_t gene_bytes, count_bytes, n_cells;
};

/* The genes of each cell; the number of cells before one that is in none of the pieces. */
int64_t cell_lengths(const struct piece *pieces, int64_t n_pieces, const int64_t *piece_of, const int64_t *indices, int64_t n_cells,
                     int64_t *lengths) {
    for (int64_t cell = 0; cell < n_cells; cell++) {
        if (piece_of[cell] < 0 || piece_of[cell] >= n_pieces) return cell;
        const struct piece *piece = pieces + piece_of[cell];
        if (indices[cell] < 0 || indices[cell] >= piece->n_cells) return cell;
        lengths[cell] = piece->offsets[indices[cell] + 1] - piece->offsets[indices[cell]];
    }
    return n_cells;
}

/* What a sampler draws by: the keys of its streams, and what the top 32 bits of a word are below if the answer is yes. */
struct law {
    uint64_t subset_key, weighted_key, weighted_below, mask_key, masked_below;
    int64_t max_genes;
};

/* Room for the longest of the cells that are drawn one after the other. */
struct room {
    uint64_t *words, *some;
    uint32_t *genes, *counts, *kept;
};

static struct room divide(char *scratch, int64_t longest) { /* 28 bytes a gene */
    uint64_t *words = (uint64_t *)scratch, *some = words + longest;
    uint32_t *genes = (uint32_t *)(some + longest);
    return (struct room){words, some, genes, genes + longest, genes + 2 * longest};
}

/* A cell's genes and counts in memory, and how much of them was fetched ahead of need. */
struct stored {
    const char *genes, *counts;
    int64_t n, gene_bytes, count_bytes, fetched;
};

static struct stored find(const struct piece *piece, int64_t index) {
    int64_t start = piece->offsets[index], n = piece->offsets[index + 1] - start;
    return (struct stored){piece->genes + start * piece->gene_bytes, piece->counts + start * piece->count_bytes,
                           n, piece->gene_bytes, piece->count_bytes, 0};
}

/* A part at each step of drawing the cell before it: a core waits if it is to fetch many lines at once. */
static void fetch(struct stored *cell) {
    for (int64_t end = cell->fetched + 64 * FETCHED; cell->fetched < end; cell->fetched += 64) {
        if (cell->fetched < cell->n * cell->gene_bytes) __builtin_prefetch(cell->genes + cell->fetched, 0, 2);
        if (cell->fetched < cell->n * cell->count_bytes) __builtin_prefetch(cell->counts + cell->fetched, 0, 2);
    }
}

/* Genes and counts of cell number `cell`, and the positions of those that are kept, whose number is returned. */
static int64_t draw_cell(const struct piece *pieces, const int64_t *piece_of, const int64_t *indices, int64_t n_cells,
                         int64_t cell, uint64_t sample, const struct law *law, const double *log1p, struct room room,
                         uint64_t *total) {
    struct stored here = find(pieces + piece_of[cell], indices[cell]), next = {0};
    if (cell + 1 < n_cells) next = find(pieces + piece_of[cell + 1], indices[cell + 1]);
    int64_t n = here.n;
    widen(room.genes, here.genes, here.gene_bytes, n);
    widen(room.counts, here.counts, here.count_bytes, n);
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += room.counts[i];
    *total = sum;
    fetch(&next);
    if (n <= law->max_genes) {
        for (int64_t i = 0; i < n; i++) room.kept[i] = (uint32_t)i;
        return n;
    }
    uint64_t key = word(law->subset_key, sample), last;
    for (int64_t i = 0; i < n; i++) room.words[i] = word(key, room.genes[i]);
    fetch(&next);
    if (word(law->weighted_key, sample) >> 32 < law->weighted_below) {
        to_clocks(room.words, room.counts, n, log1p, (double *)room.some);
        fetch(&next);
        last = select_word(room.words, n, law->max_genes, room.some);
    } else {
        last = select_uniform(room.words, n, law->max_genes, room.some);
    }
    fetch(&next);
    smallest(room.words, n, law->max_genes, last, room.kept);
    fetch(&next);
    return law->max_genes;
}

static inline float value_of(uint32_t count, const double *log1p) {
    return (float)(count < TABLE ? log1p[count] : logarithm(1.0 + count));
}

/* Cell i is number indices[i] of piece piece_of[i]; what is kept of it goes to offsets[i] of genes, counts, values, masked and
   positions (in the cell). `scratch` holds 28 bytes for each gene of the longest cell. */
void draw_cells(const struct piece *pieces, const int64_t *piece_of, const int64_t *indices, int64_t n_cells, int64_t longest,
                const uint64_t *samples, const struct law *law, const double *log1p, const int64_t *offsets, char *scratch,
                uint32_t *genes, uint32_t *counts, float *values, uint8_t *masked, int32_t *positions, uint64_t *totals) {
    struct room room = divide(scratch, longest);
    for (int64_t cell = 0; cell < n_cells; cell++) {
        int64_t first = offsets[cell];
        uint64_t sample = samples[cell], key = word(law->mask_key, sample);
        int64_t number = draw_cell(pieces, piece_of, indices, n_cells, cell, sample, law, log1p, room, totals + cell);
        for (int64_t i = 0; i < number; i++) {
            positions[first + i] = (int32_t)room.kept[i];
            genes[first + i] = room.genes[room.kept[i]];
            counts[first + i] = room.counts[room.kept[i]];
            values[first + i] = value_of(counts[first + i], log1p);
        }
        for (int64_t i = 0; i < number; i++) masked[first + i] = word(key, genes[first + i]) >> 32 < law->masked_below;
    }
}

/* The stable sort by gene of 0 .. n-1, as pairs (gene - *least, position), in `a` or in `b`, which have room for n of them. Least
   digits first. */
static const uint64_t *sort_positions(const int32_t *genes, int64_t n, int32_t *least, uint64_t *a, uint64_t *b) {
    int32_t lowest = INT32_MAX, greatest = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        lowest = genes[i] < lowest ? genes[i] : lowest;
        greatest = genes[i] > greatest ? genes[i] : greatest;
    }
    int bits = n && greatest > lowest ? 32 - __builtin_clz((uint32_t)greatest - (uint32_t)lowest) : 1;
    int steps = (bits + DIGIT_BITS - 1) / DIGIT_BITS, width = (bits + steps - 1) / steps;
    uint64_t low = ((uint64_t)1 << width) - 1;
    *least = lowest;
    for (int step = 0; step < steps; step++) {
        uint32_t place[2][1 << DIGIT_BITS], before = 0; /* two: neighbours often have one digit, and would wait for each other */
        memset(place[0], 0, sizeof **place << width);
        memset(place[1], 0, sizeof **place << width);
        for (int64_t i = 0; i < n; i++) place[i & 1][((uint32_t)genes[i] - (uint32_t)lowest) >> step * width & low]++;
        for (uint64_t digit = 0; digit <= low; digit++) {
            uint32_t here = place[0][digit] + place[1][digit];
            place[0][digit] = before;
            before += here;
        }
        for (int64_t i = 0; i < n; i++) {
            uint64_t pair = step ? a[i] : (uint64_t)((uint32_t)genes[i] - (uint32_t)lowest) << 32 | (uint64_t)i;
            b[place[0][pair >> (32 + step * width) & low]++] = pair;
        }
        uint64_t *swap = a;
        a = b, b = swap;
    }
    return a;
}

/* How many of the cells' genes are masked. */
int64_t count_masked(const uint8_t *masked, const int64_t *starts, const int64_t *lengths, int64_t n_cells) {
    int64_t sum = 0;
    for (int64_t cell = 0; cell < n_cells; cell++)
        for (int64_t i = 0; i < lengths[cell]; i++) sum += masked[starts[cell] + i] != 0;
    return sum;
}

/* A batch's tokens in the order of their genes, and its masked ones. `scratch` holds 20 bytes for each token. Returns the number
   of query_genes, which have room for all masked ones. */
static int64_t put_in_order(const int32_t *genes, int64_t n_tokens, const int32_t *masked, int64_t n_masked, char *scratch,
                            int32_t *query_genes, int32_t *query_index, int32_t *query_order, int32_t *gene_order) {
    uint64_t *a = (uint64_t *)scratch, *b = a + n_tokens;
    int32_t *number_of = (int32_t *)(b + n_tokens); /* of a masked token among them; else -1 */
    int32_t least;
    const uint64_t *sorted = sort_positions(genes, n_tokens, &least, a, b);
    uint64_t *queries = sorted == a ? b : a; /* (gene - least, number) */
    for (int64_t i = 0; i < n_tokens; i++) number_of[i] = -1;
    for (int64_t i = 0; i < n_masked; i++) number_of[masked[i]] = (int32_t)i;
    int64_t found = 0, n_queries = 0;
    for (int64_t i = 0; i < n_tokens; i++) {
        uint32_t position = (uint32_t)sorted[i];
        int32_t number = number_of[position];
        gene_order[i] = (int32_t)position;
        queries[found] = (sorted[i] & 0xFFFFFFFF00000000u) | (uint32_t)number;
        found += number >= 0;
    }
    uint64_t last = UINT64_MAX;
    for (int64_t i = 0; i < n_masked; i++) {
        uint32_t number = (uint32_t)queries[i];
        uint64_t gene = queries[i] >> 32;
        n_queries += gene != last;
        last = gene;
        query_genes[n_queries - 1] = (int32_t)((uint32_t)gene + (uint32_t)least);
        query_index[number] = (int32_t)(n_queries - 1);
        query_order[i] = (int32_t)number;
    }
    return n_queries;
}

/* CellBatch.pack: cell i is lengths[i] genes from starts[i] on, and gets the tokens from token_offsets[i] on. `scratch` holds
   20 bytes for each token. Returns the number of query_genes, which have room for all masked ones.
   A list is made by writing at its end always, and moving the end only if it was meant: no branch that can't be foreseen. */
int64_t pack_cells(const uint32_t *genes, const uint32_t *counts, const float *values, const uint8_t *masked,
                   const int64_t *starts, const int64_t *lengths, int64_t n_cells, const int64_t *token_offsets,
                   int32_t cls_token, int32_t pad_token, float masked_value, char *scratch,
                   int32_t *out_genes, float *out_values, int32_t *out_masked, float *targets, int64_t *target_counts,
                   int32_t *query_genes, int32_t *query_index, int32_t *query_order, int32_t *gene_order) {
    int64_t n_tokens = token_offsets[n_cells], n_masked = 0;
    int32_t *list = (int32_t *)scratch;
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
    return put_in_order(out_genes, n_tokens, out_masked, n_masked, scratch, query_genes, query_index, query_order, gene_order);
}

/* draw_cells and pack_cells at once, without what lies between them; cells without pads. masked, targets, target_counts and the
   queries have room for all genes; sizes = {masked genes, query_genes}. `scratch` holds 28 bytes for each gene of the longest
   cell, or 20 for each token if that is more. */
void make_batch(const struct piece *pieces, const int64_t *piece_of, const int64_t *indices, int64_t n_cells, int64_t longest,
                const uint64_t *samples, const struct law *law, const double *log1p, const int64_t *token_offsets,
                int32_t cls_token, float masked_value, char *scratch, int64_t *sizes, uint64_t *totals,
                int32_t *genes, float *values, int32_t *masked, float *targets, int64_t *target_counts,
                int32_t *query_genes, int32_t *query_index, int32_t *query_order, int32_t *gene_order) {
    struct room room = divide(scratch, longest);
    uint32_t *list = (uint32_t *)room.some; /* the kept genes that are masked; `words` and `some` are free by then */
    uint8_t *hidden = (uint8_t *)room.words;
    int64_t n_masked = 0;
    for (int64_t cell = 0; cell < n_cells; cell++) {
        int64_t token = token_offsets[cell];
        uint64_t sample = samples[cell], key = word(law->mask_key, sample);
        int64_t number = draw_cell(pieces, piece_of, indices, n_cells, cell, sample, law, log1p, room, totals + cell);
        genes[token] = cls_token, values[token] = 0;
        token++;
        for (int64_t i = 0; i < number; i++) {
            genes[token + i] = (int32_t)room.genes[room.kept[i]];
            values[token + i] = value_of(room.counts[room.kept[i]], log1p);
        }
        for (int64_t i = 0; i < number; i++) hidden[i] = word(key, (uint32_t)genes[token + i]) >> 32 < law->masked_below;
        int64_t found = 0;
        for (int64_t i = 0; i < number; i++) {
            list[found] = (uint32_t)i;
            found += hidden[i];
        }
        for (int64_t i = 0; i < found; i++, n_masked++) {
            masked[n_masked] = (int32_t)(token + list[i]);
            targets[n_masked] = values[token + list[i]];
            target_counts[n_masked] = room.counts[room.kept[list[i]]];
            values[token + list[i]] = masked_value;
        }
    }
    sizes[0] = n_masked;
    sizes[1] = put_in_order(genes, token_offsets[n_cells], masked, n_masked, scratch,
                            query_genes, query_index, query_order, gene_order);
}
