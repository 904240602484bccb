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
    /// Prefix of embedding, layers and final norm, with the final dot.
    pub model: &'static str,
    /// Output head, without `.weight`.
    pub head: &'static str,
    /// Module of a dense layer's MLP and of the shared expert.
    pub feed_forward: &'static str,
    /// Module that holds router and experts in the published layout.
    pub moe: &'static str,
    /// The router in it, as published and in the fused layout that transformers 5 can write.
    pub router: [&'static str; 2],
    /// The bias that only choices see, the same two ways.
    pub choice_bias: [&'static str; 2],
    /// Whether that bias is stored as `[1, experts]` instead of `[experts]`.
    pub choice_bias_is_row: bool,
    /// Names of an expert's gate, up and down matrices in the published layout.
    pub projections: [&'static str; 3],
    /// Module of the shared expert, where the family has one.
    pub shared: &'static str,
    /// How a stock checkpoint holds the routed experts.
    pub storage: ExpertStorage,
}

/// How a stock checkpoint of a family holds the routed experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertStorage {
    /// One tensor per expert and matrix. The fused layout that transformers 5 can write instead is read too:
    /// `gate_up_proj` `[experts, 2·width, hidden]`, gate rows first, and `down_proj` `[experts, hidden, width]`.
    Separate,
    /// All experts in `gate_up_proj` `[experts, hidden, 2·width]` and `down_proj` `[experts, width, hidden]`, or their
    /// transposes in MXFP4.
    Fused {
        /// Whether gate and up alternate; otherwise all of gate comes first.
        interleaved: bool,
    },
}

impl Default for Names {
    /// The names that most families share.
    fn default() -> Self {
        Names {
            model: "model.",
            head: "lm_head",
            feed_forward: "mlp",
            moe: "mlp",
            router: ["gate"; 2],
            choice_bias: ["gate.e_score_correction_bias"; 2],
            choice_bias_is_row: false,
            projections: Projection::ALL.map(Projection::mlp_name),
            shared: "",
            storage: ExpertStorage::Separate,
        }
    }
}

impl Names {
    /// Module that holds router and experts in the fused layout that transformers 5 can write.
    const FUSED_MOE: &'static str = "mlp";

    /// Embedding table, `[vocabulary, hidden]`.
    pub fn embedding(&self) -> String {
        format!("{}embed_tokens.weight", self.model)
    }

    /// Final norm, without `.weight`.
    pub fn final_norm(&self) -> String {
        format!("{}norm", self.model)
    }

    /// Output head, `[vocabulary, hidden]`; absent where it is tied to the embedding.
    pub fn head_weight(&self) -> String {
        format!("{}.weight", self.head)
    }

    /// Bias of the output head, `[vocabulary]`.
    pub fn head_bias(&self) -> String {
        format!("{}.bias", self.head)
    }

    /// Prefix of everything in layer `l`, with the final dot.
    pub fn layer(&self, l: usize) -> String {
        format!("{}layers.{l}.", self.model)
    }

    /// Whether a tensor belongs to the layers for multi-token prediction that some checkpoints of models with
    /// `layers` layers have behind them; the model itself does not use them.
    pub fn is_multi_token(&self, name: &str, layers: usize) -> bool {
        let rest = name.strip_prefix(self.model).unwrap_or(name);
        let number = rest.strip_prefix("layers.").and_then(|r| r.split('.').next()?.parse::<usize>().ok());
        number.is_some_and(|l| l >= layers) || rest.starts_with("mtp")
    }

    /// Norm before the attention, without `.weight`.
    pub fn input_norm(&self, l: usize) -> String {
        format!("{}input_layernorm", self.layer(l))
    }

    /// Norm before the feed-forward part, without `.weight`.
    pub fn post_attention_norm(&self, l: usize) -> String {
        format!("{}post_attention_layernorm", self.layer(l))
    }

    /// A parameter of the attention, such as `q_proj.weight`.
    pub fn attention(&self, l: usize, parameter: &str) -> String {
        format!("{}self_attn.{parameter}", self.layer(l))
    }

    /// A matrix of a dense layer's MLP, without `.weight`.
    pub fn dense(&self, l: usize, projection: Projection) -> String {
        format!("{}{}.{}", self.layer(l), self.feed_forward, projection.mlp_name())
    }

    /// The router without `.weight`, `[experts, hidden]`: as published, and in the fused layout.
    pub fn routers(&self, l: usize) -> [String; 2] {
        self.in_moe(l, self.router)
    }

    /// The bias that only choices see: as published, and in the fused layout.
    pub fn choice_biases(&self, l: usize) -> [String; 2] {
        self.in_moe(l, self.choice_bias)
    }

    fn in_moe(&self, l: usize, [published, fused]: [&str; 2]) -> [String; 2] {
        let prefix = self.layer(l);
        [format!("{prefix}{}.{published}", self.moe), format!("{prefix}{}.{fused}", Names::FUSED_MOE)]
    }

    /// A matrix of a routed expert as published, without `.weight`.
    pub fn expert(&self, l: usize, e: usize, projection: Projection) -> String {
        format!("{}{}", self.expert_prefix(l, e), self.projections[projection as usize])
    }

    /// Prefix of everything that belongs to routed expert `e`, with the final dot.
    pub fn expert_prefix(&self, l: usize, e: usize) -> String {
        format!("{}{}.experts.{e}.", self.layer(l), self.moe)
    }

    /// Prefixes of everything that belongs to routed experts: as published, and in the fused layout.
    pub fn experts(&self, l: usize) -> [String; 2] {
        self.in_moe(l, ["experts."; 2])
    }

    /// Tensors that hold the gate and up matrices, or the down matrices, of all experts: stem of the two names that
    /// they can have.
    pub fn fused(&self, l: usize, down: bool) -> [String; 2] {
        let name = if down { "down_proj" } else { "gate_up_proj" };
        self.experts(l).map(|prefix| format!("{prefix}{name}"))
    }

    /// A matrix of the shared expert, without `.weight`.
    pub fn shared(&self, l: usize, projection: Projection) -> String {
        format!("{}{}.{}.{}", self.layer(l), self.feed_forward, self.shared, projection.mlp_name())
    }

    /// The scalar gate of the shared expert, `[1, hidden]`.
    pub fn shared_gate(&self, l: usize) -> String {
        format!("{}{}.{}_gate.weight", self.layer(l), self.feed_forward, self.shared)
    }
}
