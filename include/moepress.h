/* moepress: MoE layers on NVIDIA GPUs.
 *
 * A layer is prepared once from weights in host or device memory; a forward pass is enqueued on the caller's stream, in
 * the caller's workspace, with plain device pointers. It allocates nothing, waits for nothing and copies nothing to the
 * host: it can be captured in a CUDA graph.
 *
 * Functions that can fail return a status (0 is success); moepress_last_error() then says in one line what was wrong and
 * what would be right. Functions may be called from any thread. The structures that functions take, and the router, begin
 * with their size, which the caller sets: fields added later at their end read as zero where a caller does not know them.
 * Where a field may be zero, that is its default.
 *
 * Build the library with  cargo rustc --release --lib --crate-type cdylib  (or staticlib).
 */
#ifndef MOEPRESS_H
#define MOEPRESS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a caller compiled against an older header no longer works. */
#define MOEPRESS_ABI_VERSION 1

typedef enum moepress_status {
    MOEPRESS_OK = 0,
    MOEPRESS_INVALID_ARGUMENT = 1, /* nothing was done */
    MOEPRESS_UNAVAILABLE = 2,      /* no usable GPU, or not this one */
    MOEPRESS_DEVICE_ERROR = 3,     /* the driver refused something */
    MOEPRESS_INTERNAL_ERROR = 4    /* a mistake of this library */
} moepress_status;

typedef enum moepress_dtype { MOEPRESS_F32 = 0, MOEPRESS_F16 = 1, MOEPRESS_BF16 = 2 } moepress_dtype;

typedef enum moepress_location { MOEPRESS_HOST = 0, MOEPRESS_DEVICE = 1 } moepress_location;

typedef enum moepress_activation {
    MOEPRESS_SWIGLU = 0,        /* silu(gate) * up */
    MOEPRESS_CLAMPED_SWIGLU = 1, /* gpt-oss: min(g, limit) sigmoid(slope min(g, limit)) (clamp(u, limit) + 1) */
    /* Of experts of two matrices (Switch Transformers, Nemotron-H): down(act(gate(x))). Their up is not looked at. */
    MOEPRESS_RELU = 2,
    MOEPRESS_GELU_TANH = 3,
    MOEPRESS_GEGLU_TANH = 4, /* gelu(gate) * up (Gemma); GELU by its tanh formula in both */
    MOEPRESS_SQUARED_RELU = 5 /* max(gate, 0)^2 */
} moepress_activation;

typedef enum moepress_expert_form {
    MOEPRESS_EXPERT_NONE = 0, /* the router must never choose it */
    MOEPRESS_EXPERT_MLP = 1,
    MOEPRESS_EXPERT_CONSTANT = 2, /* a vector, whatever the input */
    MOEPRESS_EXPERT_ALIAS = 3     /* another expert's weights */
} moepress_expert_form;

typedef enum moepress_matrix_form {
    MOEPRESS_MATRIX_DENSE = 0,
    MOEPRESS_MATRIX_LOW_RANK = 1, /* U V, and sparse rows where there are any */
    MOEPRESS_MATRIX_DELTA = 2     /* the layer's base of this matrix, plus U V */
} moepress_matrix_form;

/* One linear map [out, in], row-major as in nn.Linear, of the layer's dtype. Strides are in elements; 0 stands for rows
 * without gaps. In device memory, addresses and rows are multiples of 16 bytes. */
typedef struct moepress_matrix {
    int32_t form;       /* moepress_matrix_form */
    int32_t rank;       /* of U V; 0 is allowed */
    const void *weight; /* [out, in], or U [out, rank] */
    int64_t weight_stride;
    const void *v; /* V [rank, in]. In device memory, what multiplies the same input lies in one matrix: V of gate, its
                      sparse rows, V of up, its sparse rows; each V from a multiple of 8 rows on, zeros between. */
    int64_t v_stride;
    const float *bias; /* [out], or null */
    const int32_t *sparse_rows; /* host, ascending: rows of the output to which sparse * x is added */
    const void *sparse;         /* [sparse_count, in] */
    int64_t sparse_stride;
    int32_t sparse_count; /* of a low-rank matrix */
    int32_t reserved;     /* 0 */
} moepress_matrix;

typedef struct moepress_expert {
    int32_t form;            /* moepress_expert_form */
    int32_t width;           /* rows of gate and up, columns of down */
    int32_t alias_of;        /* MOEPRESS_EXPERT_ALIAS: an expert that is no alias */
    int32_t reserved;        /* 0 */
    const float *constant;   /* MOEPRESS_EXPERT_CONSTANT: [hidden] */
    moepress_matrix gate, up, down;
} moepress_expert;

typedef enum moepress_scoring {
    MOEPRESS_SOFTMAX = 0,
    MOEPRESS_SIGMOID = 1,
    MOEPRESS_SPARSE_MIXER = 2 /* Phi-3.5-MoE */
} moepress_scoring;

typedef enum moepress_choice {
    MOEPRESS_BY_SCORE = 0,
    MOEPRESS_BY_BIASED_SCORE = 1, /* score + choice_bias chooses, the score weighs (DeepSeek-V3) */
    MOEPRESS_BY_LOGIT = 2         /* gpt-oss, Llama 4 */
} moepress_choice;

/* From logits to experts and weights. All memory is the host's. Whatever the logits, the ids of a token are distinct and its
 * weights finite: NaN and -inf count as the least finite number, +inf as the largest. */
typedef struct moepress_router {
    size_t struct_size;
    int32_t scoring;          /* moepress_scoring */
    int32_t choice;           /* moepress_choice */
    int32_t groups;           /* 0: no group limit */
    int32_t groups_kept;
    int32_t groups_by_two;    /* score of a group: 0 its largest choice value, 1 the sum of the two largest */
    int32_t renormalise;      /* 0: score * scale; 1: score / max(sum of the chosen + added, least) * scale */
    float scale; /* 0: 1 */
    float added;
    float least;
    float sparse_mixer_threshold;
    const float *weight;      /* [experts, hidden]: makes the logits from the tokens; null: logits are given */
    const float *bias;        /* [experts], of the logits, or null */
    const float *choice_bias; /* [experts], or null */
    const int32_t *group_of;  /* [experts]; null: consecutive experts in groups of equal size */
    const uint8_t *live;      /* [experts], 0 where the row must not be chosen; null: all may */
    /* Dynamic skipping (NAEE, arXiv 2402.14800): the chosen experts of least weight whose weights sum to less than this share
     * of the sum of all are left out. 0: none. A rule "second weight < b * first" of top-2 routers is b / (1 + b). */
    float skip_tail;
    int32_t skip_keeps_weights; /* 0: the other weights grow to the old sum; 1: they stay as they are */
} moepress_router;

typedef struct moepress_layer_spec {
    size_t struct_size;
    int32_t hidden;   /* 1 to 67107840 */
    int32_t dtype;    /* moepress_dtype of activations and weights; sums are f32 */
    int32_t location; /* moepress_location of the experts: HOST copies them, DEVICE uses them where they lie */
    int32_t top_k;    /* experts per token, without the shared one: 1 to 32 */
    int32_t experts_count;
    int32_t activation; /* moepress_activation */
    float limit, slope; /* of MOEPRESS_CLAMPED_SWIGLU; 0: 7 and 1.702, those of gpt-oss */
    int32_t weights_multiply_inputs; /* 1: Llama 4 */
    /* Expert parallelism: experts of the whole model; for each its index in `experts`, or -1. 0 and null: all are here.
     * Ids and router rows are the model's. */
    int32_t expert_map_count;
    const int32_t *expert_map;
    const moepress_expert *experts;
    const moepress_expert *shared; /* an expert that every token passes, or null */
    const float *shared_gate;      /* host, [hidden]: sigmoid(x . gate) multiplies its output; null: 1 */
    const moepress_router *router; /* null: ids and weights are given */
    const moepress_matrix *bases;  /* of gate, up and down, dense; null weights where there is none. Or null */
    int32_t base_width;            /* rows of the bases of gate and up: width of the experts that have them */
    int32_t reserved;              /* 0 */
} moepress_layer_spec;

typedef enum moepress_routing {
    MOEPRESS_ROUTE_GIVEN = 0,  /* ids and weights */
    MOEPRESS_ROUTE_LOGITS = 1, /* logits, and the layer's rule */
    MOEPRESS_ROUTE_TOKENS = 2  /* the layer's router */
} moepress_routing;

/* A forward pass. All pointers are device memory. Strides are in elements, 0 for rows without gaps. Rows of x, out and
 * residual are of the layer's dtype; their addresses and strides are multiples of 16 bytes, so that a stride of 0 needs a
 * `hidden` that is a multiple of 8 (of 4 in f32). Ids, weights and logits lie at multiples of 4 bytes. */
typedef struct moepress_forward_args {
    size_t struct_size;
    int64_t tokens; /* 0 to 4067203 */
    const void *x;  /* [tokens, hidden] */
    int64_t x_stride;
    void *out; /* [tokens, hidden]; may be `residual`, not `x` */
    int64_t out_stride;
    const void *residual; /* added to the result, or null */
    int64_t residual_stride;
    int32_t routing;      /* moepress_routing */
    int32_t reserved;     /* 0 */
    const int32_t *ids;   /* [tokens, slots], slots = top_k, + 1 with a shared expert (whose id is the number of experts of
                             the model). Other ids, negative ones too, stand for nothing; repeated ones add up. */
    const float *weights; /* [tokens, slots] */
    const float *logits;  /* [tokens, experts, + 1 with a gated shared expert (before the sigmoid)] */
    int64_t logits_stride;
    void *workspace; /* 256-byte aligned, any content, for one stream at a time */
    size_t workspace_bytes; /* moepress_layer_workspace_bytes of `tokens` or more */
} moepress_forward_args;

typedef struct moepress_device moepress_device;
typedef struct moepress_layer moepress_layer;

/* MOEPRESS_ABI_VERSION of the library. */
uint32_t moepress_abi_version(void);

/* What went wrong in this thread's last call that failed; never null. Valid until the thread's next call. */
const char *moepress_last_error(void);

/* Number of usable GPUs. */
moepress_status moepress_device_count(int32_t *count);

/* Opens a GPU and loads the kernels, in its primary context: that of the CUDA runtime. */
moepress_status moepress_device_open(int32_t ordinal, moepress_device **device);

/* Layers stay valid. Null is allowed. */
void moepress_device_close(moepress_device *device);

/* Prepares a layer of up to 1024 experts, 32 of them per token, in up to 64 groups. Waits for its copies: host memory of the
 * spec may go when it returns. Weights in device memory must stay as they are until the layer is destroyed. */
moepress_status moepress_layer_create(const moepress_device *device, const moepress_layer_spec *spec,
                                      moepress_layer **layer);

/* What was enqueued with the layer must have ended. Null is allowed. */
void moepress_layer_destroy(moepress_layer *layer);

/* Workspace for up to max_tokens tokens, 4067203 at most; never less for more tokens. */
moepress_status moepress_layer_workspace_bytes(const moepress_layer *layer, int64_t max_tokens, size_t *bytes);

/* Enqueues a forward pass on a CUstream or cudaStream_t of the device; null is the default stream. Several threads may use
 * one layer at a time, each with a stream and a workspace of its own. */
moepress_status moepress_layer_forward(const moepress_layer *layer, const moepress_forward_args *args, void *stream);

#ifdef __cplusplus
}
#endif
#endif
