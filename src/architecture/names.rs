//! How the tensors of a family are called.

/// One of the three matrices of a SwiGLU MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// W_gate, `[width, hidden]`.
    Gate,
    /// W_up, `[width, hidden]`.
    Up,
    /// W_down, `[hidden, width]`.
    Down,
}

impl Projection {
    /// All three, in the order in which they are used.
    pub const ALL: [Projection; 3] = [Projection::Gate, Projection::Up, Projection::Down];

    /// `gate`, `up` or `down`.
    pub fn name(self) -> &'static str {
        match self {
            Projection::Gate => "gate",
            Projection::Up => "up",
            Projection::Down => "down",
        }
    }

    /// Name of the matrix in a plain MLP.
    pub fn mlp_name(self) -> &'static str {
        match self {
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }
}

/// The tensor names of a decoder family.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// Module that holds router and experts in the published layout.
    pub moe: &'static str,
    /// Names of an expert's gate, up and down matrices in the published layout.
    pub projections: [&'static str; 3],
    /// Module of the shared expert, where the family has one.
    pub shared: &'static str,
}

impl Names {
    /// Embedding table, `[vocabulary, hidden]`.
    pub const EMBEDDING: &'static str = "model.embed_tokens.weight";
    /// Final norm, `[hidden]`.
    pub const FINAL_NORM: &'static str = "model.norm.weight";
    /// Output head, `[vocabulary, hidden]`; absent where it is tied to the embedding.
    pub const HEAD: &'static str = "lm_head.weight";
    /// Module that holds router and experts in the fused layout that transformers 5 can write.
    const FUSED_MOE: &'static str = "mlp";

    /// Prefix of everything in layer `l`, with the final dot.
    pub fn layer(l: usize) -> String {
        format!("model.layers.{l}.")
    }

    /// Layer norm before the attention, `[hidden]`.
    pub fn input_norm(l: usize) -> String {
        format!("model.layers.{l}.input_layernorm.weight")
    }

    /// Layer norm before the feed-forward part, `[hidden]`.
    pub fn post_attention_norm(l: usize) -> String {
        format!("model.layers.{l}.post_attention_layernorm.weight")
    }

    /// A parameter of the attention, such as `q_proj.weight`.
    pub fn attention(l: usize, parameter: &str) -> String {
        format!("model.layers.{l}.self_attn.{parameter}")
    }

    /// A matrix of a dense layer's MLP, without `.weight`.
    pub fn dense(l: usize, projection: Projection) -> String {
        format!("model.layers.{l}.mlp.{}", projection.mlp_name())
    }

    /// The router's weight as published, `[experts, hidden]`.
    pub fn router(&self, l: usize) -> String {
        format!("model.layers.{l}.{}.gate.weight", self.moe)
    }

    /// The router's weight in the fused layout.
    pub fn fused_router(l: usize) -> String {
        format!("model.layers.{l}.{}.gate.weight", Names::FUSED_MOE)
    }

    /// A matrix of a routed expert as published, without `.weight`.
    pub fn expert(&self, l: usize, e: usize, projection: Projection) -> String {
        format!("{}{}", self.expert_prefix(l, e), self.projections[projection as usize])
    }

    /// Prefix of everything that belongs to routed expert `e`, with the final dot.
    pub fn expert_prefix(&self, l: usize, e: usize) -> String {
        format!("model.layers.{l}.{}.experts.{e}.", self.moe)
    }

    /// All experts' gate and up matrices in the fused layout, `[experts, 2·width, hidden]`, gate rows first.
    pub fn fused_gate_up(l: usize) -> String {
        format!("model.layers.{l}.{}.experts.gate_up_proj", Names::FUSED_MOE)
    }

    /// All experts' down matrices in the fused layout, `[experts, hidden, width]`.
    pub fn fused_down(l: usize) -> String {
        format!("model.layers.{l}.{}.experts.down_proj", Names::FUSED_MOE)
    }

    /// A matrix of the shared expert, without `.weight`.
    pub fn shared(&self, l: usize, projection: Projection) -> String {
        format!("model.layers.{l}.mlp.{}.{}", self.shared, projection.mlp_name())
    }

    /// The scalar gate of the shared expert, `[1, hidden]`.
    pub fn shared_gate(&self, l: usize) -> String {
        format!("model.layers.{l}.mlp.{}_gate.weight", self.shared)
    }
}
