/* Calls every function of moepress.h through pointers that the test hands over, as a C program would. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "moepress.h"

/* In the order of tests/ffi.rs. */
struct api {
    uint32_t (*abi_version)(void);
    const char *(*last_error)(void);
    moepress_status (*device_count)(int32_t *);
    moepress_status (*device_open)(int32_t, moepress_device **);
    void (*device_close)(moepress_device *);
    moepress_status (*layer_create)(const moepress_device *, const moepress_layer_spec *, moepress_layer **);
    void (*layer_destroy)(moepress_layer *);
    moepress_status (*workspace_bytes)(const moepress_layer *, int64_t, size_t *);
    moepress_status (*forward)(const moepress_layer *, const moepress_forward_args *, void *);
};

/* The pointers above have the types of the header. */
_Static_assert(_Generic(&moepress_abi_version, __typeof__(((struct api *)0)->abi_version): 1), "abi_version");
_Static_assert(_Generic(&moepress_last_error, __typeof__(((struct api *)0)->last_error): 1), "last_error");
_Static_assert(_Generic(&moepress_device_count, __typeof__(((struct api *)0)->device_count): 1), "device_count");
_Static_assert(_Generic(&moepress_device_open, __typeof__(((struct api *)0)->device_open): 1), "device_open");
_Static_assert(_Generic(&moepress_device_close, __typeof__(((struct api *)0)->device_close): 1), "device_close");
_Static_assert(_Generic(&moepress_layer_create, __typeof__(((struct api *)0)->layer_create): 1), "layer_create");
_Static_assert(_Generic(&moepress_layer_destroy, __typeof__(((struct api *)0)->layer_destroy): 1), "layer_destroy");
_Static_assert(_Generic(&moepress_layer_workspace_bytes, __typeof__(((struct api *)0)->workspace_bytes): 1), "bytes");
_Static_assert(_Generic(&moepress_layer_forward, __typeof__(((struct api *)0)->forward): 1), "forward");

enum { HIDDEN = 16, WIDTH = 24, EXPERTS = 3, TOP_K = 2, TOKENS = 5, RANK = 8 };

#define EXPECT(condition)                                                                                  \
    do {                                                                                                   \
        if (!(condition)) {                                                                                \
            snprintf(message, length, "line %d: %s; %s", __LINE__, #condition, api->last_error());         \
            return 1;                                                                                      \
        }                                                                                                  \
    } while (0)

static float next_value(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / (1 << 23) - 1.0f;
}

static void fill(float *values, size_t count, uint32_t seed) {
    for (size_t i = 0; i < count; i++) values[i] = next_value(&seed) * 0.5f;
}

/* The errors of a caller. Works without a GPU. */
int check_errors(const struct api *api, char *message, size_t length) {
    EXPECT(api->abi_version() == MOEPRESS_ABI_VERSION);
    int32_t count = -1;
    moepress_status status = api->device_count(&count);
    EXPECT(status == MOEPRESS_OK ? count > 0 : status == MOEPRESS_UNAVAILABLE && api->last_error()[0] != 0);
    moepress_device *device = NULL;
    EXPECT(api->device_open(-1, &device) == MOEPRESS_INVALID_ARGUMENT && device == NULL);
    EXPECT(strcmp(api->last_error(), "ordinal: -1, expected 0 or more") == 0);
    EXPECT(api->device_open(100000, &device) == MOEPRESS_UNAVAILABLE && device == NULL);
    EXPECT(api->device_open(0, NULL) == MOEPRESS_INVALID_ARGUMENT);
    api->device_close(NULL);
    moepress_layer *layer = NULL;
    moepress_layer_spec spec = {.struct_size = sizeof spec};
    EXPECT(api->layer_create(NULL, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT && layer == NULL);
    EXPECT(strcmp(api->last_error(), "device: null, expected a pointer") == 0);
    api->layer_destroy(NULL);
    size_t bytes;
    EXPECT(api->workspace_bytes(NULL, 1, &bytes) == MOEPRESS_INVALID_ARGUMENT);
    moepress_forward_args args = {.struct_size = sizeof args};
    EXPECT(api->forward(NULL, &args, NULL) == MOEPRESS_INVALID_ARGUMENT);
    return 0;
}

/* What a layer of a device is refused for. */
int check_refusals(const struct api *api, const moepress_device *device, char *message, size_t length) {
    moepress_layer *layer = NULL;
    moepress_expert experts[EXPERTS] = {{0}};
    moepress_layer_spec spec = {.struct_size = sizeof spec, .hidden = HIDDEN, .top_k = TOP_K,
                                .experts_count = EXPERTS, .experts = experts};
    spec.struct_size = 4;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strstr(api->last_error(), "spec.struct_size: 4, expected at most") == api->last_error());
    spec.struct_size = sizeof spec;
    spec.dtype = 9;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strcmp(api->last_error(), "dtype: 9, expected a moepress_dtype") == 0);
    spec.dtype = MOEPRESS_F32;
    experts[1].form = MOEPRESS_EXPERT_MLP;
    experts[1].width = WIDTH;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strcmp(api->last_error(), "experts[1].gate.weight: null, expected a matrix [24, 16]") == 0);
    const moepress_matrix delta = {.form = MOEPRESS_MATRIX_DELTA};
    experts[1].gate = experts[1].up = experts[1].down = delta;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strcmp(api->last_error(), "expert 1, gate: no base in this layer, expected one") == 0);
    const moepress_matrix bases[3] = {{0}};
    spec.bases = bases;
    spec.base_width = WIDTH;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    experts[1].gate.sparse_count = 1;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strcmp(api->last_error(), "experts[1].gate.sparse_count: 1, expected 0: not low rank") == 0);
    EXPECT(layer == NULL);
    return 0;
}

enum { SPARSE_ROW = 3 };

/* out += weight * expert(x), the textbook way; where v is not null, gate is U V, and s is added to one of its rows. */
static void reference(const float *gate, const float *v, const float *s, const float *up, const float *down,
                      const float *x, float weight, float *out) {
    float z[RANK] = {0}, h[WIDTH];
    if (v)
        for (int r = 0; r < RANK; r++)
            for (int i = 0; i < HIDDEN; i++) z[r] += v[r * HIDDEN + i] * x[i];
    for (int w = 0; w < WIDTH; w++) {
        float g = 0, u = 0;
        if (v)
            for (int r = 0; r < RANK; r++) g += gate[w * RANK + r] * z[r];
        for (int i = 0; i < HIDDEN; i++) {
            if (!v) g += gate[w * HIDDEN + i] * x[i];
            if (v && w == SPARSE_ROW) g += s[i] * x[i];
            u += up[w * HIDDEN + i] * x[i];
        }
        h[w] = g / (1 + expf(-g)) * u;
    }
    for (int i = 0; i < HIDDEN; i++) {
        float y = 0;
        for (int w = 0; w < WIDTH; w++) y += down[i * WIDTH + w] * h[w];
        out[i] += weight * y;
    }
}

/* A layer of a dense expert, one whose gate is low rank with a sparse row, and an alias, in f32, against the textbook. Device memory is host
 * memory here. */
int check_layer(const struct api *api, const moepress_device *device, char *message, size_t length) {
    static float gate[2][WIDTH * HIDDEN], v[RANK * HIDDEN], s[HIDDEN], up[2][WIDTH * HIDDEN], down[2][HIDDEN * WIDTH];
    for (int e = 0; e < 2; e++) {
        fill(gate[e], WIDTH * HIDDEN, 10 + e);
        fill(up[e], WIDTH * HIDDEN, 20 + e);
        fill(down[e], HIDDEN * WIDTH, 30 + e);
    }
    fill(v, RANK * HIDDEN, 40);
    fill(s, HIDDEN, 41);
    const int32_t sparse_row = SPARSE_ROW;
    moepress_expert experts[EXPERTS] = {{0}};
    for (int e = 0; e < 2; e++) {
        experts[e] = (moepress_expert){.form = MOEPRESS_EXPERT_MLP, .width = WIDTH, .gate = {.weight = gate[e]},
                                       .up = {.weight = up[e]}, .down = {.weight = down[e]}};
    }
    experts[1].gate =
        (moepress_matrix){.form = MOEPRESS_MATRIX_LOW_RANK, .rank = RANK, .weight = gate[1], .v = v,
                          .sparse_count = 1, .sparse_rows = &sparse_row, .sparse = s};
    experts[2] = (moepress_expert){.form = MOEPRESS_EXPERT_ALIAS, .alias_of = 1};
    moepress_layer_spec spec = {.struct_size = sizeof spec, .hidden = HIDDEN, .dtype = MOEPRESS_F32, .top_k = TOP_K,
                                .experts_count = EXPERTS, .experts = experts};
    moepress_layer *layer = NULL;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_OK);

    size_t bytes = 0;
    EXPECT(api->workspace_bytes(layer, TOKENS, &bytes) == MOEPRESS_OK && bytes > 0);
    float *workspace = aligned_alloc(256, (bytes + 255) / 256 * 256);
    float *x = aligned_alloc(256, 1024), *out = aligned_alloc(256, 1024);
    int32_t *ids = aligned_alloc(256, 256);
    float *weights = aligned_alloc(256, 256);
    memset(workspace, 0xff, bytes);
    fill(x, TOKENS * HIDDEN, 50);
    fill(weights, TOKENS * TOP_K, 60);
    /* The last token chooses an expert and its alias, the one before leaves a slot empty. */
    const int32_t chosen[TOKENS * TOP_K] = {0, 1, 2, 0, 1, 0, -1, 1, 1, 2};
    memcpy(ids, chosen, sizeof chosen);
    moepress_forward_args args = {.struct_size = sizeof args, .tokens = TOKENS, .x = x, .out = out, .ids = ids,
                                  .weights = weights, .workspace = workspace, .workspace_bytes = bytes};
    EXPECT(api->forward(layer, &args, NULL) == MOEPRESS_OK);
    for (int t = 0; t < TOKENS; t++) {
        float expected[HIDDEN] = {0};
        for (int k = 0; k < TOP_K; k++) {
            int e = chosen[t * TOP_K + k] == 2 ? 1 : chosen[t * TOP_K + k];
            if (e < 0) continue;
            reference(gate[e], e ? v : NULL, s, up[e], down[e], x + t * HIDDEN, weights[t * TOP_K + k], expected);
        }
        for (int i = 0; i < HIDDEN; i++) EXPECT(fabsf(out[t * HIDDEN + i] - expected[i]) < 1e-5f);
    }
    args.workspace_bytes = bytes - 1;
    EXPECT(api->forward(layer, &args, NULL) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strstr(api->last_error(), "workspace_bytes: ") == api->last_error());
    api->layer_destroy(layer);
    free(workspace), free(x), free(out), free(ids), free(weights);
    return 0;
}
