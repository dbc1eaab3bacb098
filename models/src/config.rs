//! What a model is: the keys of config.json, read tolerantly and checked strictly.
//!
//! Three dialects are read: this project's and the published RAMba configs (`chunk_size` is S, `mamba_chunk_size` is
//! Q), and plain transformers Mamba-2 (`num_hidden_layers` blocks, `chunk_size` is Q).  Python's `Infinity` and `NaN`
//! literals and transformers' `{"__float__": "Infinity"}` are understood.  Keys without a use are reported as one
//! warning; contradictions are errors, all of them at once.  A `Config` that passed [`Config::problems`] describes a
//! model whose every dimension is positive, divides where it must and fits in memory arithmetic: code built on it
//! need not check again.

use crate::error::ModelError;
use crate::variants::Attention;
use serde_json::{Map, Value, json};
use std::fmt;
use std::path::Path;

/// Something wrong with a configuration: the keys concerned and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key, or the keys that contradict each other, e.g. `hidden_size, num_attention_heads`.
    pub at: String,
    /// What was expected and what came.
    pub what: String,
}

impl Problem {
    /// Whether `key` is among the keys it is about.
    fn concerns(&self, key: &str) -> bool {
        self.at.split(", ").any(|at| at == key)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.at, self.what)
    }
}

/// A configuration as read from text.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// The configuration, without problems.
    pub config: Config,
    /// Things to tell the user once: keys that were ignored and why.
    pub warnings: Vec<String>,
    /// `tie_word_embeddings` was absent: believe the weights (tied if they have no `lm_head.weight`).
    pub tie_is_assumed: bool,
}

/// The dialect in which a configuration is written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    /// RAMba's keys; can describe every model.
    Ramba,
    /// transformers' Mamba-2 keys, so that transformers opens the folder; only for `num_upper_groups = 0`.
    Mamba2,
}

/// A layer of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// A Mamba-2 block.
    Mamba,
    /// Makes chunk keys, values and landmarks; at most once.
    Chunking,
    /// Chooses and weighs chunks for the attention layers after it.
    Retrieval,
    /// Hierarchical sparse attention over the chosen chunks.
    Attention,
    /// A variant in its place, with keys and values of its own.
    Variant,
    /// Attention to a sliding window, in stacks without Mamba.
    Window,
    /// A gated feed-forward layer, in stacks without Mamba.
    Mlp,
}

/// Whether a size matters to every model or only to those with chunk memory, or without Mamba.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    Any,
    Memory,
    Transformer,
}

/// One integer key: its name, value, bounds and scope.
struct Size {
    key: &'static str,
    value: usize,
    min: usize,
    max: usize,
    scope: Scope,
}

/// The one list of keys: it makes the struct, its defaults (the preset `tiny`), the reader, the writer and the bounds.
macro_rules! config_keys {
    (sizes { $($(#[$sm:meta])* $s:ident = $sd:expr, $smin:expr, $smax:expr, $scope:ident;)* }
     floats { $($(#[$fm:meta])* $f:ident = $fd:expr;)* }
     flags { $($(#[$bm:meta])* $b:ident = $bd:expr;)* }) => {
        /// A model's sizes and switches, by their names in config.json.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $($(#[$sm])* pub $s: usize,)*
            $($(#[$fm])* pub $f: f64,)*
            $($(#[$bm])* pub $b: bool,)*
            /// Bounds on dt after softplus; `(0, ∞)` means none.
            pub time_step_limit: (f64, f64),
            /// The dialect to write.
            pub model_type: ModelType,
            /// In place of hierarchical sparse attention.
            pub attention: Option<Attention>,
        }

        impl Default for Config {
            fn default() -> Self {
                Self {
                    $($s: $sd,)* $($f: $fd,)* $($b: $bd,)*
                    time_step_limit: (0.0, f64::INFINITY),
                    model_type: ModelType::Ramba,
                    attention: None,
                }
            }
        }

        impl Config {
            fn sizes(&self) -> Vec<Size> {
                vec![$(Size { key: stringify!($s), value: self.$s, min: $smin, max: $smax, scope: Scope::$scope },)*]
            }
            fn floats(&self) -> Vec<(&'static str, f64)> {
                vec![$((stringify!($f), self.$f),)*]
            }
            fn flags(&self) -> Vec<(&'static str, bool)> {
                vec![$((stringify!($b), self.$b),)*]
            }
            /// Sets `key` from `value`; false if no field has that name.
            fn set(&mut self, key: &str, value: &Value, problems: &mut Vec<Problem>) -> bool {
                match key {
                    $(stringify!($s) => read(key, value, as_size, "a whole number", problems, &mut self.$s),)*
                    $(stringify!($f) => read(key, value, as_float, "a number", problems, &mut self.$f),)*
                    $(stringify!($b) => read(key, value, Value::as_bool, "true or false", problems, &mut self.$b),)*
                    "attention" => match value.as_str().map(Attention::from_json) {
                        Some(Ok(a)) => self.attention = Some(a),
                        Some(Err(what)) => problems.push(Problem { at: key.into(), what }),
                        None => problems.push(Problem {
                            at: key.into(),
                            what: format!("expected a variant's name or text, found {}", kind(value)),
                        }),
                    },
                    "time_step_limit" => {
                        read(key, value, as_limit, "two numbers [low, high]", problems, &mut self.time_step_limit)
                    }
                    _ => return false,
                }
                true
            }
        }
    };
}

config_keys! {
    sizes {
        /// Token ids.
        vocab_size = 256, 1, 1 << 24, Any;
        /// D, the width of the residual stream.
        hidden_size = 64, 1, 1 << 17, Any;
        /// E / D.
        expand = 2, 1, 64, Any;
        /// P, the width of a scan head.
        head_dim = 32, 1, 1 << 14, Any;
        /// R, the scan's state per channel.
        state_size = 16, 1, 1 << 14, Any;
        /// g, groups that share B and C.
        n_groups = 1, 1, 1 << 14, Any;
        /// Taps of the causal convolution.
        conv_kernel = 4, 1, 64, Any;
        /// Q, the scan's block: changes speed, not meaning.
        mamba_chunk_size = 32, 1, 1 << 16, Any;
        /// Mamba-2 blocks before the chunk memory.
        num_lower_layers = 2, 0, 4096, Any;
        /// Mamba-2 blocks after it.
        num_upper_layers = 2, 0, 4096, Memory;
        /// Groups that share one retrieval; 0 is plain Mamba-2.
        num_upper_groups = 1, 0, 4096, Any;
        /// Mamba-2 blocks after each attention layer.
        num_mamba_per_gca = 1, 1, 4096, Memory;
        /// Layers of the chunk encoder; 0: chunks are only normalised and the landmark is a mean.
        encoder_layers = 1, 0, 256, Memory;
        /// S, tokens per chunk.
        chunk_size = 16, 1, 1 << 16, Memory;
        /// K, chunks that a token selects.
        chunk_topk = 4, 1, 4096, Memory;
        /// H, query heads of the sparse attention and of the chunk encoder.
        num_attention_heads = 4, 1, 1 << 14, Memory;
        /// h, key/value heads and retrieval heads.
        num_kv_heads = 2, 1, 1 << 14, Memory;
        /// Key/value heads of the chunk encoder.
        num_key_value_heads = 4, 1, 1 << 14, Memory;
        /// h·r, the width of landmarks and retrieval queries.
        retrieval_dim = 32, 1, 1 << 17, Memory;
        /// Tokens that the window layers of a stack without Mamba see.
        window_size = 64, 1, 1 << 20, Transformer;
    }
    floats {
        /// Of the norms in Mamba-2 blocks and the final one.
        layer_norm_epsilon = 1e-5;
        /// Of every norm outside the Mamba-2 blocks.
        rms_eps = 1e-6;
        /// Standard deviation of freshly made linear weights.
        initializer_range = 0.02;
        /// Least initial dt.
        time_step_min = 1e-3;
        /// Largest initial dt.
        time_step_max = 0.1;
        /// Initial dt is raised to this.
        time_step_floor = 1e-4;
    }
    flags {
        /// One zero logit more in each chunk's softmax.
        enable_softmax1 = false;
        /// Softmax in place of stick-breaking chunk weights.
        enable_softmax = false;
        /// RMSNorm on attention queries and keys.
        enable_qk_norm = false;
        /// RMSNorm on retrieval queries and landmarks.
        enable_lmk_norm = false;
        /// `lm_head` is the embedding matrix.
        tie_word_embeddings = true;
        /// Window attention and feed-forward layers in place of Mamba-2 blocks; only with an attention variant.
        transformer = false;
    }
}

/// Keys that say nothing about what is computed here; read without a word.
const SILENT: &[&str] = &[
    "_name_or_path",
    "architectures",
    "auto_map",
    "block_q",
    "bos_token_id",
    "dt_rank",
    "dtype",
    "eos_token_id",
    "fused_add_norm",
    "inference_segment",
    "layer_types",
    "lmk_token_id",
    "offloading_to_cpu",
    "output_attentions",
    "output_hidden_states",
    "pad_id",
    "pad_token_id",
    "pad_vocab_size_multiple",
    "rescale_prenorm_residual",
    "return_dict",
    "segment_size",
    "ssm_cfg",
    "time_step_init_scheme",
    "time_step_rank",
    "time_step_scale",
    "torch_dtype",
    "transformers_version",
    "use_cache",
];

/// Switches of which this project computes one setting: (key, the only supported value, what that is).
const FIXED: &[(&str, bool, &str)] = &[
    ("use_bias", false, "linear layers have no bias"),
    ("use_conv_bias", true, "the convolution has a bias"),
    ("rms_norm", true, "the gated norm is part of every block"),
];

/// Parameters beyond which a configuration is taken for a mistake.
const MAX_PARAMETERS: u128 = 1 << 40;

impl Config {
    /// Reads `path`, a config.json or a folder that holds one.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Parsed, ModelError> {
        let mut path = path.as_ref().to_path_buf();
        if path.is_dir() {
            path.push("config.json");
        }
        let bytes = std::fs::read(&path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
        let text = String::from_utf8_lossy(&bytes);
        Self::from_json(&text, &path.display().to_string())
    }

    /// Reads the text of a config.json; `origin` names it in messages.
    pub fn from_json(text: &str, origin: &str) -> Result<Parsed, ModelError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let json_error = |source| ModelError::Json { origin: origin.into(), source };
        let value: Value = serde_json::from_str(&quote_python_floats(text)).map_err(json_error)?;
        let Value::Object(object) = value else {
            let problems = vec![Problem {
                at: "the file".into(),
                what: format!("expected an object of keys, found {}", kind(&value)),
            }];
            return Err(ModelError::Config { origin: origin.into(), problems });
        };
        let mut reader = Reader { object: &object, problems: vec![], warnings: vec![] };
        let config = reader.read();
        let Reader { mut problems, mut warnings, .. } = reader;
        // An unreadable key left its default behind: contradictions with that would only confuse.
        let unread: Vec<String> = problems.iter().map(|p| p.at.clone()).collect();
        problems.extend(config.problems().into_iter().filter(|p| !unread.iter().any(|key| p.concerns(key))));
        if !problems.is_empty() {
            return Err(ModelError::Config { origin: origin.into(), problems });
        }
        for w in &mut warnings {
            w.insert_str(0, &format!("{origin}: "));
        }
        let tie_is_assumed = object.get("tie_word_embeddings").is_none_or(Value::is_null);
        Ok(Parsed { config, warnings, tie_is_assumed })
    }

    /// The text of a config.json that [`Config::from_json`] reads back to the same configuration.
    pub fn to_json(&self) -> String {
        let mut o = Map::new();
        let plain = self.model_type == ModelType::Mamba2 && self.num_upper_groups == 0;
        if plain {
            o.insert("architectures".into(), json!(["Mamba2ForCausalLM"]));
        }
        o.insert("model_type".into(), json!(if plain { "mamba2" } else { "ramba" }));
        for Size { key, value, scope, .. } in self.sizes() {
            match key {
                "num_lower_layers" if plain => o.insert("num_hidden_layers".into(), json!(value)),
                "mamba_chunk_size" if plain => o.insert("chunk_size".into(), json!(value)),
                "num_upper_groups" if plain => None,
                _ if plain && scope == Scope::Memory => None,
                _ if !self.transformer && scope == Scope::Transformer => None,
                _ => o.insert(key.into(), json!(value)),
            };
        }
        for (key, value) in self.floats() {
            if !(plain && key == "rms_eps") {
                o.insert(key.into(), float(value));
            }
        }
        for (key, value) in self.flags() {
            let needed = key != "transformer" || value;
            if needed && (!plain || key == "tie_word_embeddings") {
                o.insert(key.into(), json!(value));
            }
        }
        if let Some(a) = &self.attention {
            o.insert("attention".into(), json!(a.to_json()));
        }
        // Left out when it is the default, because no spelling of infinity suits all readers.
        if self.time_step_limit != (0.0, f64::INFINITY) {
            o.insert("time_step_limit".into(), json!([float(self.time_step_limit.0), float(self.time_step_limit.1)]));
        }
        o.insert("num_heads".into(), json!(self.n_ssm_heads()));
        if !plain {
            o.insert("num_hidden_layers".into(), json!(self.num_lower_layers.saturating_add(self.n_upper_layers())));
        }
        o.insert("hidden_act".into(), json!("silu"));
        for (key, value, _) in FIXED {
            o.insert((*key).into(), json!(value));
        }
        o.insert("residual_in_fp32".into(), json!(true));
        // A tree of plain values always prints.
        serde_json::to_string_pretty(&Value::Object(o)).unwrap_or_default() + "\n"
    }

    /// An error naming every problem, if there is any; `origin` says whose configuration it is.
    pub fn validate(&self, origin: &str) -> Result<(), ModelError> {
        let problems = self.problems();
        if problems.is_empty() { Ok(()) } else { Err(ModelError::Config { origin: origin.into(), problems }) }
    }

    /// All that is wrong with this configuration; empty if it describes a model.
    pub fn problems(&self) -> Vec<Problem> {
        let mut p = Problems(vec![]);
        let memory = self.num_upper_groups > 0;
        let matters = |s: &&Size| match s.scope {
            Scope::Any => true,
            Scope::Memory => memory,
            Scope::Transformer => self.transformer,
        };
        for s in self.sizes().iter().filter(matters) {
            let Size { key, value, min, max, .. } = *s;
            p.check(value >= min, key, || format!("expected at least {min}, found {value}"));
            p.check(value <= max, key, || {
                format!("expected at most {max}, found {value}; no such model fits anywhere")
            });
        }
        self.check_floats(&mut p);
        // Contradictions with a size that is itself out of bounds would only confuse.
        let outside: Vec<String> = p.0.iter().map(|p| p.at.clone()).collect();
        let mut contradictions = Problems(vec![]);
        self.check_scan(&mut contradictions);
        if memory {
            self.check_memory(&mut contradictions);
        }
        self.check_attention(&mut contradictions, memory);
        p.0.extend(contradictions.0.into_iter().filter(|c| !outside.iter().any(|key| c.concerns(key))));
        if self.model_type == ModelType::Mamba2 && memory {
            let what = format!(
                "\"mamba2\" cannot describe a model with num_upper_groups = {}; use \"ramba\"",
                self.num_upper_groups
            );
            p.0.push(Problem { at: "model_type, num_upper_groups".into(), what });
        }
        if p.0.is_empty() {
            let count = self.count_parameters();
            let at = "vocab_size, hidden_size, num_lower_layers, num_upper_layers";
            p.check(count <= MAX_PARAMETERS, at, || {
                format!("{count} parameters in all, more than {MAX_PARAMETERS}; is a size wrong?")
            });
        }
        p.0
    }

    fn check_floats(&self, p: &mut Problems) {
        for (key, v) in self.floats() {
            p.check(v.is_finite() && v >= 0.0, key, || format!("expected a finite number >= 0, found {v}"));
        }
        p.check(self.time_step_min > 0.0, "time_step_min", || {
            format!("expected more than 0, found {}", self.time_step_min)
        });
        p.check(self.time_step_min <= self.time_step_max, "time_step_min, time_step_max", || {
            format!("the least initial dt, {}, is above the largest, {}", self.time_step_min, self.time_step_max)
        });
        let (low, high) = self.time_step_limit;
        p.check(low >= 0.0 && low < high && low.is_finite(), "time_step_limit", || {
            format!("expected 0 <= low < high, found [{low}, {high}]; leave the key out for no limit")
        });
    }

    fn check_scan(&self, p: &mut Problems) {
        let (e, m) = (self.d_inner(), self.n_ssm_heads());
        let at = "expand, hidden_size, head_dim";
        p.check(is_multiple(e, self.head_dim), at, || {
            format!("expand * hidden_size = {e} must be a multiple of head_dim = {}", self.head_dim)
        });
        if is_multiple(e, self.head_dim) {
            p.check(is_multiple(m, self.n_groups), "n_groups, expand, hidden_size, head_dim", || {
                format!(
                    "num_heads = expand * hidden_size / head_dim = {m} must be a multiple of n_groups = {}",
                    self.n_groups
                )
            });
        }
        let at = "num_lower_layers, num_upper_groups";
        p.check(self.num_lower_layers > 0 || self.num_upper_groups > 0, at, || {
            "both are 0: the model has no layers".into()
        });
    }

    fn check_memory(&self, p: &mut Problems) {
        let divides = |p: &mut Problems, a: (&str, usize), b: (&str, usize)| {
            let at = format!("{}, {}", a.0, b.0);
            p.check(is_multiple(a.1, b.1), &at, || {
                format!("{} = {} must be a multiple of {} = {}", a.0, a.1, b.0, b.1)
            });
        };
        let heads = ("num_attention_heads", self.num_attention_heads);
        let kv_heads = ("num_kv_heads", self.num_kv_heads);
        divides(p, ("hidden_size", self.hidden_size), heads);
        divides(p, heads, kv_heads);
        if self.attention.is_none() {
            divides(p, ("retrieval_dim", self.retrieval_dim), kv_heads);
        }
        let per_group = self.num_upper_groups.saturating_mul(self.num_mamba_per_gca);
        let at = "num_upper_layers, num_upper_groups, num_mamba_per_gca";
        p.check(self.num_upper_layers > 0 && is_multiple(self.num_upper_layers, per_group), at, || {
            format!(
                "num_upper_layers = {} must be a positive multiple of num_upper_groups * num_mamba_per_gca = {} * {}",
                self.num_upper_layers, self.num_upper_groups, self.num_mamba_per_gca
            )
        });
        if self.encoder_layers > 0 && self.attention.is_none() {
            divides(p, heads, ("num_key_value_heads", self.num_key_value_heads));
            let d = self.attention_head_dim();
            p.check(d.is_multiple_of(2), "hidden_size, num_attention_heads", || {
                format!("the chunk encoder's rotary embedding needs an even width per head, found {d}; change either or set encoder_layers = 0")
            });
            p.check(self.mlp_dim() > 0, "hidden_size, encoder_layers", || {
                format!(
                    "hidden_size = {} gives the chunk encoder's MLP no width; use at least 24 or encoder_layers = 0",
                    self.hidden_size
                )
            });
        }
    }

    fn check_attention(&self, p: &mut Problems, memory: bool) {
        let Some(a) = &self.attention else {
            p.check(!self.transformer, "transformer", || "needs an attention variant: set attention".into());
            return;
        };
        p.check(memory, "attention, num_upper_groups", || {
            format!("with num_upper_groups = 0 there is no layer for {}", a.name)
        });
        if self.transformer {
            let d = self.attention_head_dim();
            p.check(d.is_multiple_of(2), "hidden_size, num_attention_heads", || {
                format!("the window's rotary embedding needs an even width per head, found {d}")
            });
            p.check(self.mlp_dim() > 0, "hidden_size", || {
                format!("hidden_size = {} gives the feed-forward layers no width; use at least 24", self.hidden_size)
            });
        }
        // Sizes that contradict each other are no sizes for a fragment.
        if p.0.is_empty()
            && let Err(what) = a.fragment(self)
        {
            p.0.push(Problem { at: "attention".into(), what: format!("{}: {what}", a.name) });
        }
    }

    /// E, the scan's width.
    pub fn d_inner(&self) -> usize {
        self.expand.saturating_mul(self.hidden_size)
    }

    /// M, the scan's heads (`num_heads` in config.json).
    pub fn n_ssm_heads(&self) -> usize {
        self.d_inner() / self.head_dim.max(1)
    }

    /// Channels of the convolution: x, B and C.
    pub fn conv_dim(&self) -> usize {
        self.d_inner().saturating_add(2usize.saturating_mul(self.n_groups).saturating_mul(self.state_size))
    }

    /// Rows of `in_proj`: z, then x, B, C, then dt.
    pub fn in_proj_dim(&self) -> usize {
        self.d_inner().saturating_add(self.conv_dim()).saturating_add(self.n_ssm_heads())
    }

    /// d, the width of an attention head.
    pub fn attention_head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads.max(1)
    }

    /// h·d, the width of the chunk memory's keys and of its values.
    pub fn kv_dim(&self) -> usize {
        self.attention_head_dim().saturating_mul(self.num_kv_heads)
    }

    /// r, the width of a retrieval head.
    pub fn retrieval_head_dim(&self) -> usize {
        self.retrieval_dim / self.num_kv_heads.max(1)
    }

    /// Inner width of the chunk encoder's MLP: ⌊8D/3⌋ rounded down to a multiple of 64.
    pub fn mlp_dim(&self) -> usize {
        (self.hidden_size / 24).saturating_mul(64)
    }

    /// I, the attention layers that share one retrieval; 0 for plain Mamba-2.
    pub fn attention_per_group(&self) -> usize {
        self.num_upper_layers.checked_div(self.num_upper_groups.saturating_mul(self.num_mamba_per_gca)).unwrap_or(0)
    }

    /// Whether this is plain Mamba-2, without chunk memory.
    pub fn is_plain(&self) -> bool {
        self.num_upper_groups == 0
    }

    /// Upper Mamba-2 blocks that exist (`num_upper_layers` is ignored without upper groups).
    fn n_upper_layers(&self) -> usize {
        if self.is_plain() { 0 } else { self.num_upper_layers }
    }

    /// The stack, in order, for sizes within bounds; a layer's index here is the `i` of its checkpoint names.
    pub fn layers(&self) -> Vec<LayerKind> {
        if self.attention.is_some() {
            return self.variant_layers();
        }
        let mut layers = vec![LayerKind::Mamba; self.num_lower_layers];
        if !self.is_plain() {
            layers.push(LayerKind::Chunking);
            for _ in 0..self.num_upper_groups {
                layers.push(LayerKind::Retrieval);
                for _ in 0..self.attention_per_group() {
                    layers.push(LayerKind::Attention);
                    layers.extend(std::iter::repeat_n(LayerKind::Mamba, self.num_mamba_per_gca));
                }
            }
        }
        layers
    }

    /// As RAMba's, with the variant in place of hierarchical sparse attention and nothing to choose by beside it.
    fn variant_layers(&self) -> Vec<LayerKind> {
        let other: &[LayerKind] =
            if self.transformer { &[LayerKind::Window, LayerKind::Mlp] } else { &[LayerKind::Mamba] };
        let mut layers = other.repeat(self.num_lower_layers);
        for _ in 0..self.num_upper_groups * self.attention_per_group() {
            layers.push(LayerKind::Variant);
            layers.extend(self.transformer.then_some(LayerKind::Mlp));
            layers.extend(other.repeat(self.num_mamba_per_gca));
        }
        layers
    }

    /// Parameters in all, tied weights once.  Only for sizes within bounds.
    fn count_parameters(&self) -> u128 {
        if self.attention.is_some() {
            return self.parameters().iter().map(|s| s.len() as u128).sum();
        }
        let [d, e, m, v] = [self.hidden_size, self.d_inner(), self.n_ssm_heads(), self.vocab_size].map(|x| x as u128);
        let mamba = self.in_proj_dim() as u128 * d
            + self.conv_dim() as u128 * (self.conv_kernel as u128 + 1)
            + 3 * m
            + e
            + e * d
            + d;
        let mut total = v * d * if self.tie_word_embeddings { 1 } else { 2 } + d;
        total += mamba * (self.num_lower_layers + self.n_upper_layers()) as u128;
        if !self.is_plain() {
            let (kv, r) = (self.kv_dim() as u128, self.retrieval_dim as u128);
            let groups = self.num_upper_groups as u128;
            let head = self.attention_head_dim() as u128;
            let encoder_kv = head * self.num_key_value_heads as u128;
            let encoder_layer =
                d * d * 2 + d + 2 * encoder_kv * (d + 1) + 2 * head + 3 * d * self.mlp_dim() as u128 + 2 * d;
            total += if self.encoder_layers > 0 { self.encoder_layers as u128 * encoder_layer + 2 * d } else { d };
            total += 2 * kv * d + r * d + if self.enable_qk_norm { head } else { 0 };
            total +=
                groups * (d + r * d + if self.enable_lmk_norm { 2 * self.retrieval_head_dim() as u128 } else { 0 });
            let attention = d + 2 * d * d + if self.enable_qk_norm { head } else { 0 };
            total += groups * self.attention_per_group() as u128 * attention;
        }
        total
    }

    /// Parameters in all, tied weights once, for sizes within bounds.
    pub fn n_parameters(&self) -> u64 {
        u64::try_from(self.count_parameters()).unwrap_or(u64::MAX)
    }
}

/// Walks the keys of one object and collects what is wrong with them.
struct Reader<'a> {
    object: &'a Map<String, Value>,
    problems: Vec<Problem>,
    warnings: Vec<String>,
}

impl Reader<'_> {
    /// The value of `key` unless absent or null (transformers writes null for "not set").
    fn get(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    fn problem(&mut self, at: &str, what: String) {
        self.problems.push(Problem { at: at.into(), what });
    }

    fn read(&mut self) -> Config {
        // The published RAMba configs also say model_type "mamba2": only the layer keys tell the dialects apart.
        let ours = self.get("num_lower_layers").is_some() || self.get("num_upper_groups").is_some();
        let plain = !ours
            && (self.get("num_hidden_layers").is_some()
                || self.get("model_type").and_then(Value::as_str) == Some("mamba2"));
        let mut c = if plain { transformers_defaults() } else { Config::default() };
        let mut unknown = vec![];
        for (key, value) in self.object.iter().filter(|(_, v)| !v.is_null()) {
            let field = match key.as_str() {
                "num_hidden_layers" if plain => "num_lower_layers",
                "chunk_size" if plain => "mamba_chunk_size",
                k => k,
            };
            // Problems are reported under the key as it stands in the file.
            let before = self.problems.len();
            if c.set(field, value, &mut self.problems) {
                self.problems[before..].iter_mut().for_each(|p| p.at = key.clone());
            } else if !self.read_derived(key, value) && !SILENT.contains(&key.as_str()) {
                unknown.push(key.as_str());
            }
        }
        if !unknown.is_empty() {
            self.warnings.push(format!("keys without a use here are ignored: {}", unknown.join(", ")));
        }
        let layers = if plain { "num_hidden_layers" } else { "num_lower_layers" };
        let hint = if self.object.contains_key("d_model") {
            " (this looks like a mamba_ssm config: convert it to the transformers form)"
        } else {
            ""
        };
        for key in ["vocab_size", "hidden_size", layers] {
            if self.get(key).is_none() {
                self.problem(key, format!("is missing{hint}"));
            }
        }
        if self.get("num_key_value_heads").is_none() {
            c.num_key_value_heads = c.num_attention_heads;
        }
        self.check_derived(&c, plain);
        c
    }

    /// Keys that restate or fix something; true if `key` is one.  Values are compared in `check_derived`.
    fn read_derived(&mut self, key: &str, value: &Value) -> bool {
        if let Some(&(_, only, why)) = FIXED.iter().find(|f| f.0 == key) {
            match value.as_bool() {
                Some(v) if v == only => {}
                Some(v) => self.problem(key, format!("{v} is not supported, only {only}: {why}")),
                None => self.problem(key, format!("expected true or false, found {}", kind(value))),
            }
            return true;
        }
        match key {
            "hidden_act" => {
                if value.as_str() != Some("silu") {
                    self.problem(key, format!("{value} is not supported, only \"silu\""));
                }
            }
            "model_type" => match value.as_str() {
                Some("ramba" | "mamba2") => {}
                Some(other) => self.problem(key, format!("{other:?} is not supported, only \"ramba\" and \"mamba2\"")),
                None => self.problem(key, format!("expected a string, found {}", kind(value))),
            },
            "residual_in_fp32" => match value.as_bool() {
                Some(true) => {}
                Some(false) => {
                    self.warnings.push("residual_in_fp32: false is ignored, the residual stream is float32".into())
                }
                None => self.problem(key, format!("expected true or false, found {}", kind(value))),
            },
            "insert_lmk" => {
                if value.as_bool().is_none() {
                    self.problem(key, format!("expected true or false, found {}", kind(value)));
                }
            }
            "num_heads" | "intermediate_size" | "num_hidden_layers" => {
                if as_size(value).is_none() {
                    self.problem(key, format!("expected a whole number, found {}", kind(value)));
                }
            }
            _ => return false,
        }
        true
    }

    fn check_derived(&mut self, c: &Config, plain: bool) {
        if !self.problems.is_empty() {
            return;
        }
        let object = self.object;
        let size = |key: &str| object.get(key).and_then(as_size);
        let (num_heads, inner, layers) = (size("num_heads"), size("intermediate_size"), size("num_hidden_layers"));
        if let Some(found) = num_heads.filter(|&n| n.checked_mul(c.head_dim) != Some(c.d_inner())) {
            let what = format!(
                "num_heads * head_dim = {found} * {} must equal expand * hidden_size = {} * {} = {}",
                c.head_dim,
                c.expand,
                c.hidden_size,
                c.d_inner()
            );
            self.problem("num_heads, head_dim, expand, hidden_size", what);
        }
        if let Some(found) = inner.filter(|&n| n != c.d_inner()) {
            let what = format!(
                "intermediate_size = {found} must equal expand * hidden_size = {} * {}",
                c.expand, c.hidden_size
            );
            self.problem("intermediate_size, expand, hidden_size", what);
        }
        let blocks = (size("chunk_size"), size("mamba_chunk_size"));
        if let (true, (Some(a), Some(b))) = (plain && blocks.0 != blocks.1, blocks) {
            let what = format!(
                "both are the scan's block in a plain Mamba-2 config, but one is {a} and the other {b}; keep chunk_size"
            );
            self.problem("chunk_size, mamba_chunk_size", what);
        }
        if !c.is_plain() && self.get("insert_lmk").and_then(Value::as_bool) == Some(true) {
            let what =
                "true is not supported, only false: landmarks come from the chunk encoder, not from inserted tokens";
            self.problem("insert_lmk", what.into());
        }
        let total = c.num_lower_layers.saturating_add(c.n_upper_layers());
        // Only a warning: transformers fills this key in on its own when it writes a RAMba config.
        if let Some(found) = layers.filter(|&n| !plain && n != total) {
            let what = format!(
                "num_hidden_layers = {found} is ignored: num_lower_layers + num_upper_layers = {total} Mamba blocks"
            );
            self.warnings.push(what);
        }
        if c.is_plain() && !plain && self.get("num_upper_layers").and_then(as_size).is_some_and(|n| n > 0) {
            let what = format!("num_upper_layers = {} is ignored because num_upper_groups = 0", c.num_upper_layers);
            self.warnings.push(what);
        }
    }
}

/// What transformers' `Mamba2Config` takes for keys that are absent.
fn transformers_defaults() -> Config {
    Config {
        head_dim: 64,
        state_size: 128,
        n_groups: 8,
        mamba_chunk_size: 256,
        num_lower_layers: 64,
        num_upper_layers: 0,
        num_upper_groups: 0,
        initializer_range: 0.1,
        tie_word_embeddings: false,
        model_type: ModelType::Mamba2,
        ..Config::default()
    }
}

/// Whether `a` is a multiple of `b`; nothing is one of 0.
fn is_multiple(a: usize, b: usize) -> bool {
    b != 0 && a.is_multiple_of(b)
}

/// Problems in the making.
struct Problems(Vec<Problem>);

impl Problems {
    fn check(&mut self, holds: bool, at: &str, what: impl FnOnce() -> String) {
        if !holds {
            self.0.push(Problem { at: at.into(), what: what() });
        }
    }
}

fn read<T>(
    key: &str,
    v: &Value,
    get: impl Fn(&Value) -> Option<T>,
    expected: &str,
    problems: &mut Vec<Problem>,
    to: &mut T,
) {
    match get(v) {
        Some(x) => *to = x,
        None => problems.push(Problem { at: key.into(), what: format!("expected {expected}, found {}", kind(v)) }),
    }
}

/// A non-negative whole number; `64.0` counts, as some writers make floats of everything.
fn as_size(v: &Value) -> Option<usize> {
    let whole = |f: f64| (f >= 0.0 && f.fract() == 0.0 && f <= (1u64 << 53) as f64).then_some(f as u64);
    usize::try_from(v.as_u64().or_else(|| v.as_f64().and_then(whole))?).ok()
}

fn as_float(v: &Value) -> Option<f64> {
    match v {
        Value::Number(n) => n.as_f64(),
        Value::Object(o) if o.len() == 1 => match o.get("__float__")?.as_str()? {
            "Infinity" | "inf" => Some(f64::INFINITY),
            "-Infinity" | "-inf" => Some(f64::NEG_INFINITY),
            "NaN" | "nan" => Some(f64::NAN),
            other => other.parse().ok(),
        },
        _ => None,
    }
}

fn as_limit(v: &Value) -> Option<(f64, f64)> {
    match v.as_array()?.as_slice() {
        [low, high] => Some((as_float(low)?, as_float(high)?)),
        _ => None,
    }
}

/// A number as JSON; the non-finite as transformers spells them.
fn float(v: f64) -> Value {
    let name = if v.is_nan() {
        "NaN"
    } else if v > 0.0 {
        "Infinity"
    } else {
        "-Infinity"
    };
    if v.is_finite() { json!(v) } else { json!({ "__float__": name }) }
}

/// A value for messages, short.
fn kind(v: &Value) -> String {
    match v {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) if s.chars().count() <= 40 => format!("the string {s:?}"),
        Value::String(s) => format!("a string of {} bytes", s.len()),
        Value::Array(a) => format!("a list of {}", a.len()),
        Value::Object(_) => "an object".into(),
    }
}

/// Turns the literals `Infinity`, `-Infinity` and `NaN`, which Python writes but JSON lacks, into
/// `{"__float__": …}`.  Text inside strings and everything else is left as it is.
fn quote_python_floats(text: &str) -> String {
    let bytes = text.as_bytes();
    let word = |i: usize| bytes.get(i).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_' || *b >= 0x80);
    let mut out = String::with_capacity(text.len());
    let (mut done, mut i, mut in_string) = (0, 0, false);
    while i < bytes.len() {
        match bytes[i] {
            b'\\' if in_string => i += 1,
            b'"' => in_string = !in_string,
            b'-' | b'I' | b'N' if !in_string && (i == 0 || !word(i - 1)) => {
                let found = ["Infinity", "-Infinity", "NaN"]
                    .into_iter()
                    .find(|w| bytes[i..].starts_with(w.as_bytes()) && !word(i + w.len()));
                if let Some(w) = found {
                    // ASCII on both sides of each cut, so these are character boundaries.
                    out.push_str(&text[done..i]);
                    out.push_str(&format!("{{\"__float__\": \"{w}\"}}"));
                    i += w.len();
                    done = i;
                    continue;
                }
            }
            _ => {}
        }
        i += 1;
    }
    out.push_str(&text[done.min(text.len())..]);
    out
}

#[cfg(test)]
mod tests;
