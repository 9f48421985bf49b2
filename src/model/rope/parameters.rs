//! The rope types of the families, with their parameters.

use serde::Serialize;
use serde_json::{Map, Value};

/// Entries that any type may have, though transformers reads them for none or for some only.
const HARMLESS: [&str; 4] = ["rope_type", "rope_theta", "original_max_position_embeddings", "finetuned"];

const LLAMA3: [&str; 3] = ["factor", "low_freq_factor", "high_freq_factor"];

const YARN: [&str; 7] =
    ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"];

/// The rope parameters of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub rope_theta: f64,
    /// How frequencies are scaled for sequences longer than in pretraining.
    #[serde(flatten)]
    pub scaling: Scaling,
}

/// The rope types, under transformers' names.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum Scaling {
    /// No scaling.
    Default,
    /// Frequencies divided by a factor.
    Linear {
        /// At least 1 in any sensible model.
        factor: f64,
    },
    /// NTK scaling by the length of a batch: none up to the model's positions, and this program runs no longer sequences.
    Dynamic {
        /// Of the positions beyond.
        factor: f64,
    },
    /// YaRN: low frequencies divided by a factor, high ones left alone, and all scores raised a little.
    Yarn(Yarn),
    /// Llama 3.1's: low frequencies divided by a factor, high ones left alone.
    Llama3(Llama3),
    /// Frequencies divided by numbers of their own, `(E / 2)`, as GGUF files have Llama 3's scaling; `config.json` has no such type.
    #[serde(skip)]
    Factors(Vec<f32>),
}

/// The parameters of Llama 3.1's rope.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Llama3 {
    /// Divisor of low frequencies.
    pub factor: f64,
    /// The longest sequence in pretraining (tokens); `max_position_embeddings` has the factor in it.
    pub original_max_position_embeddings: f64,
    /// Frequencies with fewer turns than this over the original positions are divided.
    pub low_freq_factor: f64,
    /// Frequencies with more turns than this are left alone.
    pub high_freq_factor: f64,
}

/// The parameters of YaRN.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Yarn {
    /// Divisor of low frequencies.
    pub factor: f64,
    /// The longest sequence in pretraining (tokens).
    pub original_max_position_embeddings: f64,
    /// Factor of cosines and sines.
    pub attention_factor: f64,
    /// Frequencies with at least this many turns over the original positions are left alone.
    pub beta_fast: f64,
    /// Frequencies with at most this many turns are divided.
    pub beta_slow: f64,
    /// Whether the border between the two is rounded to whole frequencies.
    pub truncate: bool,
}

impl RopeParameters {
    /// Reads the entries that `Spelling::entries` returns.
    ///
    /// # Errors
    /// Says which entry is missing, not supported or out of range.
    pub fn read(entries: &Map<String, Value>, max_position_embeddings: usize) -> Result<Self, String> {
        let kind = entries.get("rope_type").and_then(Value::as_str).unwrap_or_default();
        let own: &[&str] = match kind {
            "default" => &[],
            "linear" | "dynamic" => &["factor"],
            "yarn" => &YARN,
            "llama3" => &LLAMA3,
            _ => {
                let kind = &entries["rope_type"];
                return Err(format!(
                    "rope type {kind} is not supported; this program has default, linear, dynamic, yarn and llama3"
                ));
            }
        };
        let known = |name: &str| HARMLESS.contains(&name) || own.contains(&name);
        if let Some((name, value)) = entries.iter().find(|(name, value)| !known(name) && !value.is_null()) {
            return Err(format!("{name} = {value} is not supported beside rope type \"{kind}\""));
        }
        let numbers = Entries(entries);
        let factor = || numbers.above_zero("factor")?.ok_or_else(|| format!("rope type \"{kind}\" needs a factor"));
        let scaling = match kind {
            "linear" => Scaling::Linear { factor: factor()? },
            "dynamic" => Scaling::Dynamic { factor: factor()? },
            "yarn" => Scaling::Yarn(Yarn::read(&numbers, max_position_embeddings)?),
            "llama3" => Scaling::Llama3(Llama3::read(&numbers)?),
            _ => Scaling::Default,
        };
        let theta = numbers.number("rope_theta")?.unwrap_or(super::DEFAULT_THETA);
        if theta < 1.0 {
            return Err(format!("rope_theta = {theta} is out of range: a number from 1 on"));
        }
        Ok(Self { rope_theta: theta, scaling })
    }

    /// The longest sequence (tokens). As in vLLM and transformers' documentation, the factor lengthens the sequences of pretraining.
    #[must_use]
    pub fn positions(&self, max_position_embeddings: usize) -> usize {
        let reached = match &self.scaling {
            Scaling::Default | Scaling::Dynamic { .. } | Scaling::Llama3(_) | Scaling::Factors(_) => {
                return max_position_embeddings;
            }
            Scaling::Linear { factor } => factor * max_position_embeddings as f64,
            Scaling::Yarn(yarn) => yarn.factor * yarn.original_max_position_embeddings,
        };
        max_position_embeddings.max(reached as usize)
    }
}

impl Llama3 {
    fn read(numbers: &Entries<'_>) -> Result<Self, String> {
        let needed = |name| {
            numbers.above_zero(name)?.ok_or_else(|| format!("rope type \"llama3\" needs {name}, a number above 0"))
        };
        let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
        if low >= high {
            return Err(format!("low_freq_factor = {low} is not below high_freq_factor = {high}"));
        }
        Ok(Self {
            factor: needed("factor")?,
            original_max_position_embeddings: needed("original_max_position_embeddings")?,
            low_freq_factor: low,
            high_freq_factor: high,
        })
    }
}

impl Yarn {
    fn read(numbers: &Entries<'_>, max_position_embeddings: usize) -> Result<Self, String> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let original = numbers.above_zero(ORIGINAL)?.ok_or_else(|| format!("rope type \"yarn\" needs {ORIGINAL}"))?;
        let factor = match (numbers.0.get("factor"), numbers.above_zero("factor")?) {
            (_, Some(factor)) => factor,
            (Some(_), None) => max_position_embeddings as f64 / original,
            (None, _) => return Err("rope type \"yarn\" needs a factor".into()),
        };
        // Zero counts as missing, as in Python's `or` and `if`.
        let unless_zero = |name| Ok::<_, String>(numbers.number(name)?.filter(|number| *number != 0.0));
        let raised = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
        let attention_factor = match (unless_zero("mscale")?, unless_zero("mscale_all_dim")?) {
            _ if numbers.number("attention_factor")?.is_some() => {
                numbers.number("attention_factor")?.unwrap_or_default()
            }
            (Some(scale), Some(all)) => raised(scale) / raised(all),
            _ => raised(1.0),
        };
        let truncate = match numbers.0.get("truncate") {
            None => true,
            Some(Value::Null) => false,
            Some(Value::Bool(truncate)) => *truncate,
            Some(other) => return Err(format!("truncate = {other} is not true or false")),
        };
        Ok(Self {
            factor,
            original_max_position_embeddings: original,
            attention_factor,
            beta_fast: unless_zero("beta_fast")?.unwrap_or(32.0),
            beta_slow: unless_zero("beta_slow")?.unwrap_or(1.0),
            truncate,
        })
    }
}

struct Entries<'a>(&'a Map<String, Value>);

impl Entries<'_> {
    fn number(&self, name: &str) -> Result<Option<f64>, String> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| format!("{name} = {value} is not a number")),
        }
    }

    fn above_zero(&self, name: &str) -> Result<Option<f64>, String> {
        match self.number(name)? {
            Some(number) if number <= 0.0 => Err(format!("{name} = {number} is out of range: a number above 0")),
            number => Ok(number),
        }
    }
}
