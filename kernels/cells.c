/* What prepare does with every count: columns mapped to tokens (map_cells), contents hashed (hash_cells), fingerprints,
   cells brought into another order (take_ranges).

   The same bits as the NumPy code of scbench.data.cells and .fingerprints, on every machine: all is integers. Nothing is
   allocated here; offsets were checked in Python, columns and tokens are checked here. Lists are made by writing at their end
   always, and moving the end only if it was meant: no branch that can't be foreseen. */

#include <stdint.h>
#include <string.h>

#define GOLDEN 0x9E3779B97F4A7C15u
#define BLOCK 512      /* tokens hashed at once */
#define BINS 64        /* of a signature */
#define EMPTY 255      /* a bin without a gene */
#define OUTSIDE 1      /* a column or a token that does not exist */
#define TOO_LARGE 2    /* a sum past 2^32 - 1 */

static inline uint64_t word(uint64_t key, uint64_t counter) { /* kernels.random.bits */
    uint64_t z = (counter + 1) * GOLDEN + key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static void widen(uint32_t *to, const char *from, int64_t bytes, int64_t first, int64_t n) {
    if (bytes == 1)
        for (int64_t i = 0; i < n; i++) to[i] = ((const uint8_t *)from)[first + i];
    else if (bytes == 2)
        for (int64_t i = 0; i < n; i++) to[i] = ((const uint16_t *)from)[first + i];
    else
        memcpy(to, (const uint32_t *)from + first, (size_t)n * 4);
}

static uint64_t sum_of_words(uint64_t key, const uint32_t *genes, const uint32_t *counts, int64_t n) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; i++) sum += word(word(key, genes[i]), counts[i]);
    return sum;
}

/* n tokens of a cell in ascending order, counts of one token summed; returns how many are left, -1 for a sum past 2^32 - 1.
   By a bit a token of the vocabulary, read in order: both tables are zero before and after. */
static int64_t sort_cell(uint32_t *genes, uint32_t *counts, int64_t n, uint64_t *sums, uint64_t *there) {
    uint32_t least = UINT32_MAX, greatest = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t gene = genes[i];
        sums[gene] += counts[i];
        there[gene >> 6] |= (uint64_t)1 << (gene & 63);
        least = gene < least ? gene : least;
        greatest = gene > greatest ? gene : greatest;
    }
    int64_t found = 0;
    int too_large = 0;
    for (uint32_t block = least >> 6; block <= greatest >> 6; block++) {
        uint64_t bits = there[block];
        there[block] = 0;
        for (; bits; bits &= bits - 1, found++) {
            uint32_t gene = block << 6 | (uint32_t)__builtin_ctzll(bits);
            too_large |= sums[gene] > UINT32_MAX;
            genes[found] = gene;
            counts[found] = (uint32_t)sums[gene];
            sums[gene] = 0;
        }
    }
    return too_large ? -1 : found;
}

/* scbench.data.cells.to_tokens: tokens[column] is a column's token, or -1. `sums` and `there`, zero, have room for a word a
   token and a bit a token. Fills out_genes and out_counts (room for all values), out_offsets [cells + 1], totals [cells].
   Returns 0, OUTSIDE or TOO_LARGE. */
int64_t map_cells(const int64_t *columns, const uint32_t *counts, const int64_t *offsets, int64_t n_cells,
                  const int32_t *tokens, int64_t n_columns, uint64_t *sums, uint64_t *there,
                  uint32_t *out_genes, uint32_t *out_counts, int64_t *out_offsets, int64_t *totals) {
    int64_t end = 0;
    out_offsets[0] = 0;
    for (int64_t cell = 0; cell < n_cells; cell++) {
        uint32_t *genes = out_genes + end, *values = out_counts + end;
        int64_t n = 0, last = -1, total = 0;
        int descends = 0;
        for (int64_t i = offsets[cell]; i < offsets[cell + 1]; i++) {
            if ((uint64_t)columns[i] >= (uint64_t)n_columns) return OUTSIDE;
            int64_t token = tokens[columns[i]];
            uint32_t count = counts[i];
            int keep = (token >= 0) & (count > 0);
            total += count;
            genes[n] = (uint32_t)token;
            values[n] = count;
            n += keep;
            descends |= keep & (token <= last);
            last = keep ? token : last;
        }
        if (descends) n = sort_cell(genes, values, n, sums, there);
        if (n < 0) return TOO_LARGE;
        end += n;
        out_offsets[cell + 1] = end;
        totals[cell] = total;
    }
    return 0;
}

/* scbench.data.cells.content_hash: of (gene, count) with the key `inner`, and of the sum with the key `outer`. */
void hash_cells(const char *genes, int64_t gene_bytes, const char *counts, int64_t count_bytes, const int64_t *offsets,
                int64_t n_cells, uint64_t inner, uint64_t outer, uint64_t *hashes) {
    uint32_t some_genes[BLOCK], some_counts[BLOCK];
    for (int64_t cell = 0; cell < n_cells; cell++) {
        uint64_t sum = 0;
        for (int64_t i = offsets[cell]; i < offsets[cell + 1]; i += BLOCK) {
            int64_t n = offsets[cell + 1] - i < BLOCK ? offsets[cell + 1] - i : BLOCK;
            widen(some_genes, genes, gene_bytes, i, n);
            widen(some_counts, counts, count_bytes, i, n);
            sum += sum_of_words(inner, some_genes, some_counts, n);
        }
        hashes[cell] = word(outer, sum);
    }
}

/* scbench.data.fingerprints.core_hash and .signatures. `listed` [n_tokens] is a token's place in the list of genes: its bin,
   value << 8, and 1 << 16 for a core gene; EMPTY << 8 without one. Returns 0 or OUTSIDE. */
int64_t fingerprint_cells(const char *genes, int64_t gene_bytes, const char *counts, int64_t count_bytes,
                          const int64_t *offsets, int64_t n_cells, const uint32_t *listed, int64_t n_tokens,
                          int64_t least_core, uint64_t inner, uint64_t outer, uint64_t core_key,
                          uint64_t *cores, uint8_t *signatures) {
    uint32_t some_genes[BLOCK], some_counts[BLOCK];
    for (int64_t cell = 0; cell < n_cells; cell++) {
        uint8_t *signature = signatures + cell * BINS;
        uint64_t sum = 0;
        int64_t core = 0;
        memset(signature, EMPTY, BINS);
        for (int64_t i = offsets[cell]; i < offsets[cell + 1]; i += BLOCK) {
            int64_t n = offsets[cell + 1] - i < BLOCK ? offsets[cell + 1] - i : BLOCK, found = 0;
            widen(some_genes, genes, gene_bytes, i, n);
            widen(some_counts, counts, count_bytes, i, n);
            for (int64_t j = 0; j < n; j++) {
                if (some_genes[j] >= n_tokens) return OUTSIDE;
                uint32_t place = listed[some_genes[j]], bin = place & 63, value = place >> 8 & 255;
                signature[bin] = signature[bin] < value ? signature[bin] : (uint8_t)value;
                some_genes[found] = value * BINS + bin; /* the gene's number in the list; found <= j */
                some_counts[found] = some_counts[j];
                found += place >> 16;
            }
            sum += sum_of_words(inner, some_genes, some_counts, found);
            core += found;
        }
        cores[cell] = core >= least_core ? word(core_key, word(outer, sum)) : 0;
    }
    return 0;
}

/* scbench.data.cells.take_ranges: values of `bytes` bytes, lengths[i] of them from starts[i] on, side by side. */
void take_ranges(const char *values, int64_t bytes, const int64_t *starts, const int64_t *lengths, int64_t n, char *taken) {
    for (int64_t i = 0; i < n; i++) {
        size_t size = (size_t)(lengths[i] * bytes);
        memcpy(taken, values + starts[i] * bytes, size);
        taken += size;
    }
}
