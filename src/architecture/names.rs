//! How the tensors of a family are called.

/// One of the matrices of an MLP; one without a gate calls its first matrix that.
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

/// The tensor names of a family.
#[derive(Clone, Debug)]
pub struct Names {
    /// Prefix of embedding, layers and final norm, with the final dot.
    pub model: &'static str,
    /// What stands in its place, and in that of [`Names::head`], in some checkpoints of the family.
    pub other_model: Option<[&'static str; 2]>,
    /// All names in the checkpoints that transformers 5 writes, of a family that it calls otherwise than published.
    pub rewritten: Option<fn() -> Names>,
    /// Embedding table, without `.weight`.
    pub embedding: &'static str,
    /// Module of the layers.
    pub layers: &'static str,
    /// Norm before the attention, without `.weight`.
    pub input_norm: &'static str,
    /// Norm behind the attention, before its output is added.
    pub attention_output_norm: &'static str,
    /// Norm before the feed-forward part.
    pub post_attention_norm: &'static str,
    /// Norm behind the feed-forward part, as published and in the fused layout that transformers 5 can write.
    pub feed_forward_output_norm: [&'static str; 2],
    /// Norms of the parts of a layer with experts, where these have their own: before the router, without the module
    /// that holds it, before and behind the shared expert, and behind routed experts.
    pub part_norms: [&'static str; 4],
    /// The number that a layer multiplies the residual stream by.
    pub layer_scale: &'static str,
    /// Norm behind the last layer.
    pub final_norm: &'static str,
    /// Module of the attention.
    pub attention: &'static str,
    /// Where queries, keys and values are projected by one matrix, whose rows are theirs in this order: its name.
    pub fused_qkv: Option<&'static str>,
    /// Output projection of the attention.
    pub attention_output: &'static str,
    /// Norms of queries and keys.
    pub qk_norms: [&'static str; 2],
    /// Attention sinks, as published and in the fused layout.
    pub sinks: [&'static str; 2],
    /// Module of a gated delta network.
    pub delta: &'static str,
    /// Module of a state space model.
    pub mamba: &'static str,
    /// Output head, without `.weight`.
    pub head: &'static str,
    /// Module of a dense layer's MLP and of the shared expert.
    pub feed_forward: &'static str,
    /// Gate, up and down matrices of a dense layer's MLP and of the shared expert.
    pub dense: [&'static str; 3],
    /// Module that holds router and experts in the published layout; empty where the layer itself does.
    pub moe: &'static str,
    /// The same in the fused layout that transformers 5 can write.
    pub fused_moe: &'static str,
    /// The maps into and out of the latent of routed experts, where they have one.
    pub latent: [&'static str; 2],
    /// The router in it, as published and in the fused layout that transformers 5 can write.
    pub router: [&'static str; 2],
    /// The bias that only choices see, the same two ways.
    pub choice_bias: [&'static str; 2],
    /// Whether that bias is stored as `[1, experts]` instead of `[experts]`.
    pub choice_bias_is_row: bool,
    /// The factors of the experts' combine weights.
    pub expert_scales: &'static str,
    /// Names of an expert's gate, up and down matrices in the published layout.
    pub projections: [&'static str; 3],
    /// The tensors in it that hold gate and up, and down, of all experts together, the same two ways.
    pub fused: [[&'static str; 2]; 2],
    /// Module of the shared expert, where the family has one, the same two ways.
    pub shared: [&'static str; 2],
    /// Where gate and up of the shared expert are one matrix, `[2·width, hidden]`, gate rows first: that and down.
    pub shared_gate_up: Option<[&'static str; 2]>,
    /// How a stock checkpoint holds the routed experts.
    pub storage: ExpertStorage,
    /// Where the names follow T5: the number of encoder layers. The other fields then speak of less.
    pub t5: Option<usize>,
}

/// How a stock checkpoint of a family holds the routed experts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertStorage {
    /// One tensor per expert and matrix. The fused layout that transformers 5 can write instead is read too:
    /// `gate_up_proj` `[experts, 2·width, hidden]`, gate rows first, and `down_proj` `[experts, hidden, width]`.
    Separate,
    /// All experts as transformers 5 fuses them, or as its FP8 checkpoints: one tensor per expert and matrix.
    OutputMajor,
    /// All experts in the transposes of these, which transformers 5 turns round; it can write them turned round, too.
    Transposed,
    /// All experts in `gate_up_proj` `[experts, hidden, 2·width]` and `down_proj` `[experts, width, hidden]`, or their
    /// transposes in MXFP4.
    Fused {
        /// Whether gate and up alternate; otherwise all of gate comes first.
        interleaved: bool,
    },
    /// Three tensors `[experts · width, hidden]`, in which the experts stand one below the other: gate, up, and the
    /// transpose of down.
    Stacked,
    /// As [`ExpertStorage::Separate`], with further numbers behind, as many, that are experts of images: see
    /// [`Names::with_images`].
    WithImages,
}

impl Default for Names {
    /// The names that most families share.
    fn default() -> Self {
        Names {
            model: "model.",
            other_model: None,
            rewritten: None,
            embedding: "embed_tokens",
            layers: "layers",
            input_norm: "input_layernorm",
            attention_output_norm: "",
            post_attention_norm: "post_attention_layernorm",
            feed_forward_output_norm: [""; 2],
            part_norms: [""; 4],
            layer_scale: "",
            final_norm: "norm",
            attention: "self_attn",
            fused_qkv: None,
            attention_output: "o_proj",
            qk_norms: ["q_norm", "k_norm"],
            sinks: ["sinks"; 2],
            delta: "linear_attn",
            mamba: "mamba",
            head: "lm_head",
            feed_forward: "mlp",
            dense: Projection::ALL.map(Projection::mlp_name),
            moe: "mlp",
            fused_moe: "mlp",
            latent: [""; 2],
            router: ["gate"; 2],
            choice_bias: ["gate.e_score_correction_bias"; 2],
            choice_bias_is_row: false,
            expert_scales: "",
            projections: Projection::ALL.map(Projection::mlp_name),
            fused: [["experts.gate_up_proj"; 2], ["experts.down_proj"; 2]],
            shared: [""; 2],
            shared_gate_up: None,
            storage: ExpertStorage::Separate,
            t5: None,
        }
    }
}

impl Names {
    /// Embedding table, `[vocabulary, hidden]`.
    pub fn embedding(&self) -> String {
        match self.t5 {
            None => format!("{}{}.weight", self.model, self.embedding),
            Some(_) => "shared.weight".into(),
        }
    }

    /// The table that the encoder, or the decoder behind one, has where embeddings are not tied.
    pub fn own_embedding(&self, of_encoder: bool) -> String {
        format!("{}.embed_tokens.weight", if of_encoder { "encoder" } else { "decoder" })
    }

    /// Final norm, without `.weight`.
    pub fn final_norm(&self) -> String {
        match self.t5 {
            None => format!("{}{}", self.model, self.final_norm),
            Some(_) => "decoder.final_layer_norm".into(),
        }
    }

    /// Norm behind the encoder, without `.weight`.
    pub fn encoder_norm(&self) -> &'static str {
        "encoder.final_layer_norm"
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
        match self.t5 {
            None => format!("{}{}.{l}.", self.model, self.layers),
            Some(encoder) if l < encoder => format!("encoder.block.{l}."),
            Some(encoder) => format!("decoder.block.{}.", l - encoder),
        }
    }

    /// Prefix of layer `l`'s feed-forward part, with the final dot: in T5 a numbered part of its own.
    fn part(&self, l: usize) -> String {
        let layer = self.layer(l);
        match self.t5 {
            None => layer,
            Some(encoder) if l < encoder => layer + "layer.1.",
            Some(_) => layer + "layer.2.",
        }
    }

    /// Whether a tensor belongs to the layers for multi-token prediction that some checkpoints of models with
    /// `layers` layers have behind them; the model itself does not use them.
    pub fn is_multi_token(&self, name: &str, layers: usize) -> bool {
        let rest = name.strip_prefix(self.model).unwrap_or(name);
        let rest_of_layers = rest.strip_prefix(self.layers).and_then(|rest| rest.strip_prefix('.'));
        let number = rest_of_layers.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        number.is_some_and(|l| l >= layers) || rest.starts_with("mtp")
    }

    /// Norm before the attention, without `.weight`.
    pub fn input_norm(&self, l: usize) -> String {
        let name = if self.t5.is_some() { "layer.0.layer_norm" } else { self.input_norm };
        format!("{}{name}", self.layer(l))
    }

    /// Norm before the feed-forward part, without `.weight`.
    pub fn post_attention_norm(&self, l: usize) -> String {
        let name = if self.t5.is_some() { "layer_norm" } else { self.post_attention_norm };
        format!("{}{name}", self.part(l))
    }

    /// Norm behind the attention, without `.weight`.
    pub fn attention_output_norm(&self, l: usize) -> String {
        format!("{}{}", self.layer(l), self.attention_output_norm)
    }

    /// Norm behind the feed-forward part, without `.weight`: as published, and in the fused layout.
    pub fn feed_forward_output_norms(&self, l: usize) -> [String; 2] {
        self.feed_forward_output_norm.map(|name| format!("{}{name}", self.layer(l)))
    }

    /// Norms of the parts of layer `l`, without `.weight` but for the router's: see [`Names::part_norms`].
    pub fn part_norms(&self, l: usize) -> [String; 4] {
        self.part_norms.map(|name| format!("{}{name}", self.layer(l)))
    }

    /// The number that layer `l` multiplies the residual stream by, `[1]`.
    pub fn layer_scale(&self, l: usize) -> String {
        format!("{}{}", self.layer(l), self.layer_scale)
    }

    /// A parameter of the attention, such as `q_proj.weight`.
    pub fn attention(&self, l: usize, parameter: &str) -> String {
        match self.t5 {
            None => format!("{}{}.{parameter}", self.layer(l), self.attention),
            Some(_) => format!("{}layer.0.SelfAttention.{}", self.layer(l), parameter.replace("_proj", "")),
        }
    }

    /// A parameter of the gated delta network, such as `A_log`.
    pub fn gated_delta(&self, l: usize, parameter: &str) -> String {
        format!("{}{}.{parameter}", self.layer(l), self.delta)
    }

    /// A parameter of the state space model, such as `A_log`.
    pub fn mamba(&self, l: usize, parameter: &str) -> String {
        format!("{}{}.{parameter}", self.layer(l), self.mamba)
    }

    /// A parameter of the short convolution, such as `in_proj`.
    pub fn short_convolution(&self, l: usize, parameter: &str) -> String {
        format!("{}conv.{parameter}", self.layer(l))
    }

    /// Norm before the attention to the encoder's output, without `.weight`.
    pub fn cross_norm(&self, l: usize) -> String {
        format!("{}layer.1.layer_norm", self.layer(l))
    }

    /// A parameter of the attention to the encoder's output, such as `q_proj`.
    pub fn cross_attention(&self, l: usize, parameter: &str) -> String {
        format!("{}layer.1.EncDecAttention.{}", self.layer(l), parameter.replace("_proj", ""))
    }

    /// The biases by relative position, `[buckets, heads]`, that layer `l` uses: those of the first layer of its stack.
    pub fn relative_bias(&self, l: usize) -> String {
        let first = self.t5.filter(|encoder| l >= *encoder).unwrap_or(0);
        self.attention(first, "relative_attention_bias.weight")
    }

    /// A matrix of a dense layer's MLP, without `.weight`.
    ///
    /// As published, and where transformers 5 puts it when it saves a family that calls the module of experts otherwise.
    pub fn dense(&self, l: usize, projection: Projection) -> [String; 2] {
        let names = if self.t5.is_some() { self.projections } else { self.dense };
        let name = names[projection as usize];
        [self.feed_forward, self.moe].map(|module| self.within(l, module, name))
    }

    /// The router without `.weight`, `[experts, hidden]`: as published, and in the fused layout.
    pub fn routers(&self, l: usize) -> [String; 2] {
        self.in_moe(l, self.router)
    }

    /// The bias that only choices see: as published, and in the fused layout.
    pub fn choice_biases(&self, l: usize) -> [String; 2] {
        self.in_moe(l, self.choice_bias)
    }

    /// Where experts of images are behind those of text ([`ExpertStorage::WithImages`]): the router of text as published,
    /// `[hidden, experts]`, the bias that only choices see, which has a row for text and one for images, and how
    /// transformers 5 calls the second.
    pub fn with_images(&self, l: usize) -> Option<[String; 3]> {
        let names = [
            "gate.weight",
            "moe_statics.e_score_correction_bias",
            "vision_moe.gate.moe_statics.e_score_correction_bias",
        ];
        (self.storage == ExpertStorage::WithImages).then(|| names.map(|name| self.within(l, self.moe, name)))
    }

    /// Whether a tensor of layer `l` is of one of the experts of images that are behind `experts` of text.
    pub fn is_of_images(&self, name: &str, l: usize, experts: usize) -> bool {
        let rest = name.strip_prefix(self.within(l, self.moe, "experts.").as_str());
        let number = rest.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        self.storage == ExpertStorage::WithImages && number.is_some_and(|e| e >= experts)
    }

    /// The factors of the experts' combine weights, `[experts]`.
    pub fn expert_scales(&self, l: usize) -> String {
        self.within(l, self.moe, self.expert_scales)
    }

    fn in_moe(&self, l: usize, [published, fused]: [&str; 2]) -> [String; 2] {
        [self.within(l, self.moe, published), self.within(l, self.fused_moe, fused)]
    }

    /// `name` within `module` of layer `l`'s feed-forward part.
    fn within(&self, l: usize, module: &str, name: &str) -> String {
        let dot = if module.is_empty() { "" } else { "." };
        format!("{}{module}{dot}{name}", self.part(l))
    }

    /// A matrix of a routed expert as published, without `.weight`.
    pub fn expert(&self, l: usize, e: usize, projection: Projection) -> String {
        format!("{}{}", self.expert_prefix(l, e), self.projections[projection as usize])
    }

    /// Prefix of everything that belongs to routed expert `e`, with the final dot.
    pub fn expert_prefix(&self, l: usize, e: usize) -> String {
        let expert = if self.t5.is_some() { "expert_" } else { "" };
        self.within(l, self.moe, &format!("experts.{expert}{e}."))
    }

    /// The maps into and out of the latent of routed experts, without `.weight`.
    pub fn latent(&self, l: usize) -> [String; 2] {
        self.latent.map(|map| self.within(l, self.moe, map))
    }

    /// A matrix that the experts of layer `l` share as their base, without `.weight`; only the moepress layout has it.
    pub fn base(&self, l: usize, projection: Projection) -> String {
        let projection = self.projections[projection as usize];
        self.within(l, self.moe, &format!("experts.base.{projection}"))
    }

    /// Prefixes of everything that belongs to routed experts: as published, and in the fused layout.
    pub fn experts(&self, l: usize) -> [String; 2] {
        self.in_moe(l, ["experts."; 2])
    }

    /// Tensors that hold the gate and up matrices, or the down matrices, of all experts: stem of the two names that
    /// they can have.
    pub fn fused(&self, l: usize, down: bool) -> [String; 2] {
        self.in_moe(l, self.fused[usize::from(down)])
    }

    /// The tensor that holds one of the matrices of all experts, where they are [`ExpertStorage::Stacked`].
    pub fn stacked(&self, l: usize, projection: Projection) -> String {
        let projection = self.projections[projection as usize];
        self.within(l, self.moe, &format!("experts.mlp.{projection}"))
    }

    /// A matrix of the shared expert, without `.weight`: as published, and in the fused layout.
    pub fn shared(&self, l: usize, projection: Projection) -> [String; 2] {
        let matrix = self.dense[projection as usize];
        self.in_moe(l, self.shared).map(|shared| format!("{shared}.{matrix}"))
    }

    /// The shared expert's gate and up in one matrix, and its down matrix, where it is stored so.
    pub fn shared_gate_up(&self, l: usize) -> Option<[String; 2]> {
        Some(self.shared_gate_up?.map(|name| format!("{}{name}", self.layer(l))))
    }

    /// The scalar gate of the shared expert, `[1, hidden]`.
    pub fn shared_gate(&self, l: usize) -> String {
        format!("{}{}.{}_gate.weight", self.layer(l), self.feed_forward, self.shared[0])
    }
}
