//! Named configurations.

use crate::config::{Config, ModelType};
use crate::error::ModelError;

/// A configuration with a name.
pub struct Preset {
    /// What to type.
    pub name: &'static str,
    /// One line for lists.
    pub description: &'static str,
    make: fn() -> Config,
}

impl Preset {
    /// The configuration.
    pub fn config(&self) -> Config {
        (self.make)()
    }
}

/// All presets, smallest first.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "tiny",
        description: "RAMba of the test fixtures: D 64, 2+2 layers, chunks of 16, bytes",
        make: Config::default,
    },
    Preset { name: "small", description: "RAMba for one CPU: D 128, 2+2 layers, chunks of 64, bytes", make: small },
    Preset { name: "mamba2-130m", description: "plain Mamba-2 130M: D 768, 24 layers", make: mamba2_130m },
    Preset {
        name: "370m",
        description: "RAMba 370M as published: D 1024, 24+24 layers, an attention every 8",
        make: ramba_370m,
    },
    Preset {
        name: "3b",
        description: "RAMba 3B as published: D 2560, 32+32 layers, an attention every 16",
        make: ramba_3b,
    },
];

/// The preset called `name`, ignoring case, or an error that lists all and the nearest.
pub fn preset(name: &str) -> Result<Config, ModelError> {
    let wanted = name.trim().to_ascii_lowercase();
    if let Some(p) = PRESETS.iter().find(|p| p.name == wanted) {
        return Ok(p.config());
    }
    let known = PRESETS.iter().map(|p| p.name).collect::<Vec<_>>().join(", ");
    Err(ModelError::UnknownPreset {
        name: name.into(),
        suggestion: nearest(&wanted, PRESETS.iter().map(|p| p.name)),
        known,
    })
}

/// The word nearest to `name`, if it is near enough to be a slip of the fingers.
pub fn nearest<'a>(name: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if name.len() > 64 {
        return None;
    }
    let near = |w: &str| if w.contains(name) && name.len() >= 2 { 1 } else { edit_distance(name, w) };
    words.map(|w| (near(w), w)).filter(|(d, w)| *d <= w.len().div_ceil(3)).min_by_key(|(d, _)| *d).map(|(_, w)| w)
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn small() -> Config {
    Config {
        hidden_size: 128,
        head_dim: 64,
        state_size: 64,
        mamba_chunk_size: 64,
        chunk_size: 64,
        chunk_topk: 8,
        num_kv_heads: 1,
        retrieval_dim: 128,
        ..Config::default()
    }
}

/// What the published RAMbas share.
fn published() -> Config {
    Config {
        vocab_size: 50280,
        head_dim: 64,
        state_size: 128,
        // Published as 256; the block changes speed only, and 64 suits caches and tensor cores.
        mamba_chunk_size: 64,
        chunk_size: 64,
        chunk_topk: 8,
        ..Config::default()
    }
}

fn ramba_370m() -> Config {
    Config {
        hidden_size: 1024,
        num_lower_layers: 24,
        num_upper_layers: 24,
        num_mamba_per_gca: 8,
        num_attention_heads: 16,
        num_kv_heads: 1,
        num_key_value_heads: 16,
        retrieval_dim: 1024,
        ..published()
    }
}

fn ramba_3b() -> Config {
    Config {
        hidden_size: 2560,
        num_lower_layers: 32,
        num_upper_layers: 32,
        num_mamba_per_gca: 16,
        encoder_layers: 2,
        num_attention_heads: 80,
        num_kv_heads: 5,
        num_key_value_heads: 80,
        retrieval_dim: 2560,
        ..published()
    }
}

fn mamba2_130m() -> Config {
    Config {
        vocab_size: 50280,
        hidden_size: 768,
        num_lower_layers: 24,
        num_upper_layers: 0,
        num_upper_groups: 0,
        head_dim: 64,
        state_size: 128,
        mamba_chunk_size: 64,
        model_type: ModelType::Mamba2,
        ..Config::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_survives_config_json() {
        for p in PRESETS {
            let c = p.config();
            assert_eq!(c.problems(), [], "{}", p.name);
            let back = Config::from_json(&c.to_json(), p.name).unwrap();
            assert_eq!(back.config, c, "{}", p.name);
            assert!(back.warnings.is_empty(), "{:?}", back.warnings);
            let listed: u64 = c.parameters().iter().map(|s| s.len() as u64).sum();
            assert_eq!(listed, c.n_parameters(), "{}", p.name);
        }
        let millions = |name| preset(name).unwrap().n_parameters() / 1_000_000;
        assert!((120..140).contains(&millions("mamba2-130m")), "{}", millions("mamba2-130m"));
        assert!((360..480).contains(&millions("370m")), "{}", millions("370m"));
        assert!((2_700..3_600).contains(&millions("3b")), "{}", millions("3b"));
    }

    #[test]
    fn unknown_names_get_a_suggestion() {
        assert_eq!(preset("Tiny").unwrap(), Config::default());
        let message = preset("smal").unwrap_err().to_string();
        assert!(message.contains("did you mean \"small\"") && message.contains("370m"), "{message}");
        assert!(preset("370").unwrap_err().to_string().contains("did you mean \"370m\""));
        assert!(!preset("transformer").unwrap_err().to_string().contains("did you mean"));
        assert!(preset("").is_err());
    }
}
