//! Which tensors a model owns: checkpoint names, shapes, initial values, weight decay; and other spellings of the names.
//!
//! The order of [`Config::parameters`] is fixed (embeddings, layers from first to last, final norm, head), and a
//! parameter's initial value depends on the seed and its own name alone, so neither order nor threads can change it.

use crate::config::{Config, LayerKind};
use crate::data::rng::stream;
use rand::Rng;
use std::borrow::Cow;

/// One tensor of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Its name in checkpoints.
    pub name: String,
    /// Row-major; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
    /// How a new one is drawn.
    pub init: Init,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The distribution of a fresh parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Normal with mean 0 and standard deviation 1/√fan_in.
    FanIn {
        /// Inputs that each output sums over.
        fan_in: usize,
    },
    /// Uniform in [-bound, bound].
    Uniform {
        /// Largest magnitude.
        bound: f64,
    },
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// softplus⁻¹ of a log-uniform draw from [min, max], raised to `floor`.
    DtBias {
        /// Least dt.
        min: f64,
        /// Largest dt.
        max: f64,
        /// dt is at least this.
        floor: f64,
    },
    /// log(1), log(2), …
    ALog,
}

/// How matrices are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum InitRule {
    /// N(0, initializer_range), as published; the convolution as in PyTorch.
    #[default]
    Normal,
    /// N(0, 1/√fan_in): better for small models.
    FanIn,
}

impl Config {
    /// Every parameter in order, with the published initialisation.  A tied `lm_head.weight` is not listed.
    pub fn parameters(&self) -> Vec<ParamSpec> {
        self.parameters_with(InitRule::Normal)
    }

    /// Every parameter in order, matrices drawn by `rule`.
    pub fn parameters_with(&self, rule: InitRule) -> Vec<ParamSpec> {
        let mut list = List { config: self, rule, specs: vec![] };
        let (v, d) = (self.vocab_size, self.hidden_size);
        list.linear("backbone.embeddings.weight", v, d);
        for (i, kind) in self.layers().into_iter().enumerate() {
            let p = format!("backbone.layers.{i}.");
            match kind {
                LayerKind::Mamba => list.mamba(&p),
                LayerKind::Chunking => list.chunking(&p),
                LayerKind::Retrieval => list.retrieval(&p),
                LayerKind::Attention => list.attention(&p),
                LayerKind::Variant => list.variant(&p),
                LayerKind::Window => list.projections(&p),
                LayerKind::Mlp => list.mlp(&p),
            }
        }
        list.norm("backbone.norm_f.weight", d);
        if !self.tie_word_embeddings {
            list.linear("lm_head.weight", v, d);
        }
        list.specs
    }
}

/// Collects the parameters, one method per kind of layer.
struct List<'a> {
    config: &'a Config,
    rule: InitRule,
    specs: Vec<ParamSpec>,
}

impl List<'_> {
    fn push(&mut self, name: impl Into<String>, shape: &[usize], init: Init, decay: bool) {
        self.specs.push(ParamSpec { name: name.into(), shape: shape.to_vec(), init, decay });
    }

    fn matrix_init(&self, fan_in: usize) -> Init {
        match self.rule {
            InitRule::Normal => Init::Normal { std: self.config.initializer_range },
            InitRule::FanIn => Init::FanIn { fan_in },
        }
    }

    /// `[out, in]`; embeddings are drawn the same way, since they are the head when tied.
    fn linear(&mut self, name: impl Into<String>, outputs: usize, inputs: usize) {
        let init = self.matrix_init(inputs);
        self.push(name, &[outputs, inputs], init, true);
    }

    fn norm(&mut self, name: impl Into<String>, width: usize) {
        self.push(name, &[width], Init::Ones, false);
    }

    /// Queries, keys and values of one layer's own.
    fn projections(&mut self, p: &str) {
        let (d, kv) = (self.config.hidden_size, self.config.kv_dim());
        self.norm(format!("{p}pre_norm.weight"), d);
        self.linear(format!("{p}q_proj.weight"), d, d);
        self.linear(format!("{p}k_proj.weight"), kv, d);
        self.linear(format!("{p}v_proj.weight"), kv, d);
        self.linear(format!("{p}o_proj.weight"), d, d);
    }

    /// What a fragment learns: matrices `[.., out, in]` as linear layers, vectors from 0.
    fn variant(&mut self, p: &str) {
        self.projections(p);
        let fragment = self.config.attention.as_ref().and_then(|a| a.fragment(self.config).ok());
        for (name, ty) in fragment.iter().flat_map(|f| f.params()) {
            let shape: Vec<usize> = ty.shape.iter().filter_map(|d| d.as_int()).collect();
            let matrix = shape.len() > 1;
            let init = if matrix { self.matrix_init(shape[shape.len() - 1]) } else { Init::Zeros };
            self.push(format!("{p}variant.{name}"), &shape, init, matrix);
        }
    }

    fn mlp(&mut self, p: &str) {
        let (d, inner) = (self.config.hidden_size, self.config.mlp_dim());
        self.norm(format!("{p}norm.weight"), d);
        self.linear(format!("{p}mlp.gate_proj.weight"), inner, d);
        self.linear(format!("{p}mlp.up_proj.weight"), inner, d);
        self.linear(format!("{p}mlp.down_proj.weight"), d, inner);
    }

    fn mamba(&mut self, p: &str) {
        let c = self.config;
        let (d, e, m) = (c.hidden_size, c.d_inner(), c.n_ssm_heads());
        self.norm(format!("{p}norm.weight"), d);
        self.push(format!("{p}mixer.A_log"), &[m], Init::ALog, false);
        self.push(format!("{p}mixer.D"), &[m], Init::Ones, false);
        let dt = Init::DtBias { min: c.time_step_min, max: c.time_step_max, floor: c.time_step_floor };
        self.push(format!("{p}mixer.dt_bias"), &[m], dt, false);
        let bound = Init::Uniform { bound: 1.0 / (c.conv_kernel as f64).sqrt() };
        let (weight, bias) = match self.rule {
            InitRule::Normal => (bound, bound),
            InitRule::FanIn => (Init::FanIn { fan_in: c.conv_kernel }, Init::Zeros),
        };
        self.push(format!("{p}mixer.conv1d.weight"), &[c.conv_dim(), 1, c.conv_kernel], weight, true);
        self.push(format!("{p}mixer.conv1d.bias"), &[c.conv_dim()], bias, false);
        self.linear(format!("{p}mixer.in_proj.weight"), c.in_proj_dim(), d);
        self.norm(format!("{p}mixer.norm.weight"), e);
        self.linear(format!("{p}mixer.out_proj.weight"), d, e);
    }

    fn chunking(&mut self, p: &str) {
        let c = self.config;
        let d = c.hidden_size;
        if c.encoder_layers > 0 {
            for j in 0..c.encoder_layers {
                self.encoder_layer(&format!("{p}encoder.layers.{j}."));
            }
            self.norm(format!("{p}encoder.norm.weight"), d);
            // Published as N(0, initializer_range); under FanIn it starts at the size of the embeddings beside it.
            let init = self.matrix_init(d);
            self.push(format!("{p}cls_emb"), &[1, 1, d], init, true);
        } else {
            self.norm(format!("{p}norm.weight"), d);
        }
        self.linear(format!("{p}proj_k.weight"), c.kv_dim(), d);
        self.linear(format!("{p}proj_v.weight"), c.kv_dim(), d);
        if c.enable_qk_norm {
            self.norm(format!("{p}k_rmsnorm.weight"), c.attention_head_dim());
        }
        self.linear(format!("{p}lmk_ln.weight"), c.retrieval_dim, d);
    }

    fn encoder_layer(&mut self, p: &str) {
        let c = self.config;
        let (d, head, inner) = (c.hidden_size, c.attention_head_dim(), c.mlp_dim());
        let (q, kv) = (head * c.num_attention_heads, head * c.num_key_value_heads);
        self.norm(format!("{p}input_layernorm.weight"), d);
        for (name, width) in [("q_proj", q), ("k_proj", kv), ("v_proj", kv)] {
            self.linear(format!("{p}self_attn.{name}.weight"), width, d);
            self.push(format!("{p}self_attn.{name}.bias"), &[width], Init::Zeros, false);
        }
        self.norm(format!("{p}self_attn.q_norm.weight"), head);
        self.norm(format!("{p}self_attn.k_norm.weight"), head);
        self.linear(format!("{p}self_attn.o_proj.weight"), d, q);
        self.norm(format!("{p}post_attention_layernorm.weight"), d);
        self.linear(format!("{p}mlp.gate_proj.weight"), inner, d);
        self.linear(format!("{p}mlp.up_proj.weight"), inner, d);
        self.linear(format!("{p}mlp.down_proj.weight"), d, inner);
    }

    fn retrieval(&mut self, p: &str) {
        let c = self.config;
        self.norm(format!("{p}pre_norm.weight"), c.hidden_size);
        self.linear(format!("{p}ln.weight"), c.retrieval_dim, c.hidden_size);
        if c.enable_lmk_norm {
            self.norm(format!("{p}lmk_q_norm.weight"), c.retrieval_head_dim());
            self.norm(format!("{p}lmk_k_norm.weight"), c.retrieval_head_dim());
        }
    }

    fn attention(&mut self, p: &str) {
        let c = self.config;
        self.norm(format!("{p}pre_norm.weight"), c.hidden_size);
        self.linear(format!("{p}q_proj.weight"), c.hidden_size, c.hidden_size);
        if c.enable_qk_norm {
            self.norm(format!("{p}q_norm.weight"), c.attention_head_dim());
        }
        self.linear(format!("{p}o_proj.weight"), c.hidden_size, c.hidden_size);
    }
}

/// The initial value of `spec`, row-major: a pure function of the spec and `seed`.
pub fn init_tensor(spec: &ParamSpec, seed: u64) -> Vec<f32> {
    let n = spec.len();
    let mut rng = stream(seed, &spec.name, &[]);
    match spec.init {
        Init::Zeros => vec![0.0; n],
        Init::Ones => vec![1.0; n],
        Init::ALog => (1..=n).map(|i| (i as f64).ln() as f32).collect(),
        Init::Uniform { bound } => (0..n).map(|_| ((2.0 * rng.random::<f64>() - 1.0) * bound) as f32).collect(),
        Init::Normal { std } => normal(&mut rng, n, std),
        Init::FanIn { fan_in } => normal(&mut rng, n, 1.0 / (fan_in.max(1) as f64).sqrt()),
        Init::DtBias { min, max, floor } => {
            let (low, high) = (min.ln(), max.ln());
            (0..n)
                .map(|_| {
                    let dt = (low + rng.random::<f64>() * (high - low)).exp().max(floor);
                    // softplus⁻¹(dt) = ln(eᵈᵗ − 1), in the form that keeps precision for small dt.
                    (dt + (-(-dt).exp_m1()).ln()) as f32
                })
                .collect()
        }
    }
}

/// `n` normal draws by Box–Muller, in pairs.
fn normal(rng: &mut impl Rng, n: usize, std: f64) -> Vec<f32> {
    let mut out = Vec::with_capacity(n + 1);
    while out.len() < n {
        // 1 − u is in (0, 1], so the logarithm is finite.
        let radius = std * (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * rng.random::<f64>()).sin_cos();
        out.push((radius * cos) as f32);
        out.push((radius * sin) as f32);
    }
    out.truncate(n);
    out
}

/// Other spellings of checkpoint names: (prefix or whole name found in the wild, ours).  First match wins.
const RENAMES: &[(&str, &str)] = &[
    ("model.backbone.embedding.weight", "backbone.embeddings.weight"),
    ("backbone.embedding.weight", "backbone.embeddings.weight"),
    ("model.backbone.", "backbone."),
    ("model.lm_head.", "lm_head."),
    ("model.embeddings.", "backbone.embeddings."),
    ("model.embedding.weight", "backbone.embeddings.weight"),
    ("model.embed_tokens.", "backbone.embeddings."),
    ("model.layers.", "backbone.layers."),
    ("model.norm_f.", "backbone.norm_f."),
    ("model.norm.", "backbone.norm_f."),
    ("embeddings.weight", "backbone.embeddings.weight"),
    ("embedding.weight", "backbone.embeddings.weight"),
    ("layers.", "backbone.layers."),
    ("norm_f.weight", "backbone.norm_f.weight"),
];

/// The name that this project uses for a tensor that a checkpoint calls `name`.
pub fn canonical_name(name: &str) -> Cow<'_, str> {
    // Wrappers of training frameworks.
    let mut inner = name;
    while let Some(rest) = ["module.", "_orig_mod."].iter().find_map(|w| inner.strip_prefix(w)) {
        inner = rest;
    }
    match RENAMES.iter().find_map(|(from, to)| inner.strip_prefix(from).map(|rest| (to, rest))) {
        Some((to, rest)) => Cow::Owned(format!("{to}{rest}")),
        None => Cow::Borrowed(inner),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn spec(init: Init, n: usize) -> ParamSpec {
        ParamSpec { name: "x".into(), shape: vec![n], init, decay: false }
    }

    fn mean_and_std(v: &[f32]) -> (f64, f64) {
        let n = v.len() as f64;
        let mean = v.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (mean, (v.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    #[test]
    fn draws_have_their_distribution() {
        let (mean, std) = mean_and_std(&init_tensor(&spec(Init::Normal { std: 0.02 }, 100_001), 1));
        assert!(mean.abs() < 3e-4 && (std - 0.02).abs() < 2e-4, "{mean} {std}");
        let (_, std) = mean_and_std(&init_tensor(&spec(Init::FanIn { fan_in: 16 }, 100_000), 1));
        assert!((std - 0.25).abs() < 3e-3, "{std}");
        let uniform = init_tensor(&spec(Init::Uniform { bound: 0.5 }, 10_000), 1);
        assert!(uniform.iter().all(|x| x.abs() <= 0.5) && (mean_and_std(&uniform).1 - 0.2887).abs() < 5e-3);
        let dt = init_tensor(&spec(Init::DtBias { min: 1e-3, max: 0.1, floor: 2e-3 }, 10_000), 1);
        let softplus: Vec<f64> = dt.iter().map(|&x| f64::from(x).exp().ln_1p()).collect();
        assert!(softplus.iter().all(|x| (1.999e-3..=0.10001).contains(x)));
        let below = softplus.iter().filter(|x| **x < 1e-2).count();
        assert!((4_700..5_300).contains(&below), "half of a log-uniform draw is below the geometric mean: {below}");
        assert_eq!(init_tensor(&spec(Init::ALog, 3), 1), [0.0, 2f32.ln(), 3f32.ln()]);
    }

    #[test]
    fn values_depend_on_seed_and_name_alone() {
        let c = Config::default();
        let specs = c.parameters();
        let embeddings = &specs[0];
        assert_eq!(init_tensor(embeddings, 5), init_tensor(embeddings, 5));
        assert_ne!(init_tensor(embeddings, 5), init_tensor(embeddings, 6));
        let named = |n: &str| init_tensor(specs.iter().find(|s| s.name == n).unwrap(), 5);
        assert_ne!(named("backbone.layers.0.mixer.in_proj.weight"), named("backbone.layers.1.mixer.in_proj.weight"));
        let deeper = Config { num_lower_layers: 9, ..c.clone() };
        assert!(deeper.parameters().iter().any(|s| s == &specs[1] && init_tensor(s, 5) == init_tensor(&specs[1], 5)));
    }

    #[test]
    fn decay_spares_norms_biases_and_scan_parameters() {
        let c = Config { enable_qk_norm: true, enable_lmk_norm: true, tie_word_embeddings: false, ..Config::default() };
        let mut names = HashSet::new();
        for s in c.parameters_with(InitRule::FanIn) {
            let spared = ["norm", "bias", "A_log", ".D"].iter().any(|p| {
                s.name.rsplit('.').take(2).any(|part| part.contains(p.trim_matches('.')) && (*p != ".D" || part == "D"))
            });
            assert_eq!(s.decay, !spared, "{}", s.name);
            assert_eq!(s.decay, s.shape.len() > 1, "{}", s.name);
            assert!(names.insert(s.name.clone()), "{} comes twice", s.name);
        }
    }

    #[test]
    fn other_spellings_are_understood() {
        for (from, to) in [
            ("backbone.layers.3.mixer.A_log", "backbone.layers.3.mixer.A_log"),
            ("model.backbone.layers.3.norm.weight", "backbone.layers.3.norm.weight"),
            ("backbone.embedding.weight", "backbone.embeddings.weight"),
            ("backbone.embeddings.weight", "backbone.embeddings.weight"),
            ("model.embeddings.weight", "backbone.embeddings.weight"),
            ("embeddings.weight", "backbone.embeddings.weight"),
            ("layers.0.norm.weight", "backbone.layers.0.norm.weight"),
            ("norm_f.weight", "backbone.norm_f.weight"),
            ("module._orig_mod.lm_head.weight", "lm_head.weight"),
            ("model.lm_head.weight", "lm_head.weight"),
            ("anything.else", "anything.else"),
        ] {
            assert_eq!(canonical_name(from), to);
        }
        for s in Config::default().parameters() {
            assert_eq!(canonical_name(&s.name), s.name);
        }
    }
}
