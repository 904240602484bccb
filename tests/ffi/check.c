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
    /* The device's memory, its content, and a stream of it that `download` waits for. */
    void *(*allocate)(size_t);
    void (*upload)(void *to, const void *from, size_t);
    void (*download)(void *to, const void *from, size_t);
    void *stream;
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
    moepress_router router = {.struct_size = sizeof router, .skip_tail = -1, .live = NULL};
    spec.router = &router;
    experts[1].form = MOEPRESS_EXPERT_NONE;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strstr(api->last_error(), "router, skip: Tail(-1.0) with top_k 2, expected a tail of 0 to 1") == api->last_error());
    EXPECT(layer == NULL);
    return 0;
}

enum { SPARSE_ROW = 3 };

/* The weights of three experts: a dense one, one whose gate is low rank with a sparse row, and an alias of it. */
static float gate[2][WIDTH * HIDDEN], v[RANK * HIDDEN], s[HIDDEN], up[2][WIDTH * HIDDEN], down[2][HIDDEN * WIDTH];
static const int32_t sparse_row = SPARSE_ROW;

static void make_experts(moepress_expert experts[EXPERTS]) {
    for (int e = 0; e < 2; e++) {
        fill(gate[e], WIDTH * HIDDEN, 10 + e);
        fill(up[e], WIDTH * HIDDEN, 20 + e);
        fill(down[e], HIDDEN * WIDTH, 30 + e);
        experts[e] = (moepress_expert){.form = MOEPRESS_EXPERT_MLP, .width = WIDTH, .gate = {.weight = gate[e]},
                                       .up = {.weight = up[e]}, .down = {.weight = down[e]}};
    }
    fill(v, RANK * HIDDEN, 40);
    fill(s, HIDDEN, 41);
    experts[1].gate = (moepress_matrix){.form = MOEPRESS_MATRIX_LOW_RANK, .rank = RANK, .weight = gate[1], .v = v,
                                        .sparse_count = 1, .sparse_rows = &sparse_row, .sparse = s};
    experts[2] = (moepress_expert){.form = MOEPRESS_EXPERT_ALIAS, .alias_of = 1};
}

static float sigmoid(float x) { return 1 / (1 + expf(-x)); }

/* out += weight * expert(x), the textbook way: SwiGLU, that of gpt-oss, or relu(gate x) without up. */
static void reference(int e, moepress_activation activation, const float *x, float weight, float *out) {
    float z[RANK] = {0}, h[WIDTH];
    for (int r = 0; r < RANK; r++)
        for (int i = 0; i < HIDDEN; i++) z[r] += v[r * HIDDEN + i] * x[i];
    for (int w = 0; w < WIDTH; w++) {
        float g = 0, u = 0;
        for (int r = 0; e && r < RANK; r++) g += gate[e][w * RANK + r] * z[r];
        for (int i = 0; i < HIDDEN; i++) {
            if (!e) g += gate[e][w * HIDDEN + i] * x[i];
            if (e && w == SPARSE_ROW) g += s[i] * x[i];
            u += up[e][w * HIDDEN + i] * x[i];
        }
        if (activation == MOEPRESS_RELU) {
            h[w] = fmaxf(g, 0);
        } else if (activation == MOEPRESS_CLAMPED_SWIGLU) {
            g = fminf(g, 7);
            h[w] = g * sigmoid(1.702f * g) * (fmaxf(fminf(u, 7), -7) + 1);
        } else {
            h[w] = g * sigmoid(g) * u;
        }
    }
    for (int i = 0; i < HIDDEN; i++) {
        float y = 0;
        for (int w = 0; w < WIDTH; w++) y += down[e][i * WIDTH + w] * h[w];
        out[i] += weight * y;
    }
}

static void *on_device(const struct api *api, const void *data, size_t bytes) {
    void *memory = api->allocate(bytes);
    api->upload(memory, data, bytes);
    return memory;
}

/* One pass of a layer whose arguments are there but for tokens, workspace and result; against the textbook with these
 * experts and weights. */
static int check_pass(const struct api *api, moepress_layer *layer, moepress_forward_args args,
                      moepress_activation activation, const int32_t *ids, const float *weights, const float *x,
                      char *message, size_t length) {
    size_t bytes = 0;
    EXPECT(api->workspace_bytes(layer, TOKENS, &bytes) == MOEPRESS_OK && bytes > 0);
    float out[TOKENS * HIDDEN];
    args.struct_size = sizeof args;
    args.tokens = TOKENS;
    args.x = on_device(api, x, sizeof out);
    args.out = api->allocate(sizeof out);
    args.workspace = api->allocate(bytes);
    args.workspace_bytes = bytes;
    EXPECT(api->forward(layer, &args, api->stream) == MOEPRESS_OK);
    api->download(out, args.out, sizeof out);
    for (int t = 0; t < TOKENS; t++) {
        float expected[HIDDEN] = {0};
        for (int k = 0; k < TOP_K; k++) {
            int e = ids[t * TOP_K + k] == 2 ? 1 : ids[t * TOP_K + k];
            if (e >= 0) reference(e, activation, x + t * HIDDEN, weights[t * TOP_K + k], expected);
        }
        for (int i = 0; i < HIDDEN; i++) EXPECT(fabsf(out[t * HIDDEN + i] - expected[i]) < 1e-5f);
    }
    args.workspace_bytes = bytes - 1;
    EXPECT(api->forward(layer, &args, api->stream) == MOEPRESS_INVALID_ARGUMENT);
    EXPECT(strstr(api->last_error(), "workspace_bytes: ") == api->last_error());
    return 0;
}

/* Layers in f32, gated and of two matrices, routed by the caller and by their rule, which skips. */
int check_layer(const struct api *api, const moepress_device *device, char *message, size_t length) {
    moepress_expert experts[EXPERTS] = {{0}};
    make_experts(experts);
    moepress_layer_spec spec = {.struct_size = sizeof spec, .hidden = HIDDEN, .dtype = MOEPRESS_F32, .top_k = TOP_K,
                                .experts_count = EXPERTS, .experts = experts};
    float x[TOKENS * HIDDEN], weights[TOKENS * TOP_K];
    fill(x, TOKENS * HIDDEN, 50);
    fill(weights, TOKENS * TOP_K, 60);
    /* The last token chooses an expert and its alias, the one before leaves a slot empty. */
    const int32_t ids[TOKENS * TOP_K] = {0, 1, 2, 0, 1, 0, -1, 1, 1, 2};
    const moepress_forward_args given = {.ids = on_device(api, ids, sizeof ids),
                                         .weights = on_device(api, weights, sizeof weights)};
    moepress_layer *layer = NULL;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_OK);
    if (check_pass(api, layer, given, MOEPRESS_SWIGLU, ids, weights, x, message, length)) return 1;
    api->layer_destroy(layer);

    /* Limit and slope by default. */
    spec.activation = MOEPRESS_CLAMPED_SWIGLU;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_OK);
    if (check_pass(api, layer, given, MOEPRESS_CLAMPED_SWIGLU, ids, weights, x, message, length)) return 1;
    api->layer_destroy(layer);

    for (int e = 0; e < 2; e++) experts[e].up.weight = NULL;
    spec.activation = MOEPRESS_RELU;
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_OK);
    if (check_pass(api, layer, given, MOEPRESS_RELU, ids, weights, x, message, length)) return 1;
    api->layer_destroy(layer);

    /* Softmax over three logits, scaled as by default: the second expert stays where it has 0.45 of the two weights or more. */
    float logits[TOKENS * EXPERTS];
    int32_t chosen[TOKENS * TOP_K];
    int skipped = 0;
    fill(logits, TOKENS * EXPERTS, 70);
    for (int t = 0; t < TOKENS; t++) {
        const float *row = logits + t * EXPERTS;
        int first = row[1] > row[0] ? 1 : 0;
        if (row[2] > row[first]) first = 2;
        int second = first == 0 ? 1 : 0;
        for (int e = second + 1; e < EXPERTS; e++)
            if (e != first && row[e] > row[second]) second = e;
        const float share = 1 / (1 + expf(row[first] - row[second]));
        const int left_out = share < 0.45f;
        skipped += left_out;
        chosen[t * TOP_K] = first;
        chosen[t * TOP_K + 1] = left_out ? -1 : second;
        weights[t * TOP_K] = left_out ? 1 : 1 - share;
        weights[t * TOP_K + 1] = left_out ? 0 : share;
    }
    EXPECT(skipped > 0 && skipped < TOKENS);
    const moepress_router router = {.struct_size = sizeof router, .renormalise = 1, .skip_tail = 0.45f};
    spec.router = &router;
    const moepress_forward_args routed = {.routing = MOEPRESS_ROUTE_LOGITS,
                                          .logits = on_device(api, logits, sizeof logits)};
    EXPECT(api->layer_create(device, &spec, &layer) == MOEPRESS_OK);
    if (check_pass(api, layer, routed, MOEPRESS_RELU, chosen, weights, x, message, length)) return 1;
    api->layer_destroy(layer);
    return 0;
}
