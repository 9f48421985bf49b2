//! The names of parameters in a GGUF file, and the order that Llama's queries and keys have there.

use crate::model::{Config, Family, Parameter};
use crate::numbers::aligned::AlignedVec;

/// The name of a parameter of a layer, or of one outside the layers.
pub(super) fn stored(layer: Option<usize>, parameter: Parameter) -> String {
    let name = match parameter {
        Parameter::EmbedTokens => "token_embd.weight",
        Parameter::InputNorm => "attn_norm.weight",
        Parameter::QProj => "attn_q.weight",
        Parameter::QBias => "attn_q.bias",
        Parameter::KProj => "attn_k.weight",
        Parameter::KBias => "attn_k.bias",
        Parameter::VProj => "attn_v.weight",
        Parameter::VBias => "attn_v.bias",
        Parameter::QNorm => "attn_q_norm.weight",
        Parameter::KNorm => "attn_k_norm.weight",
        Parameter::OProj => "attn_output.weight",
        Parameter::PostNorm => "ffn_norm.weight",
        Parameter::GateProj => "ffn_gate.weight",
        Parameter::UpProj => "ffn_up.weight",
        Parameter::DownProj => "ffn_down.weight",
        Parameter::FinalNorm => "output_norm.weight",
        Parameter::LmHead => "output.weight",
    };
    layer.map_or_else(|| name.to_owned(), |layer| format!("blk.{layer}.{name}"))
}

/// Which way numbers go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    FromFile,
    ToFile,
}

/// Puts the rows of a parameter into the order of the other side. For its architecture `llama`, llama.cpp rotates numbers 2 i and 2 i + 1 of
/// a head, where Hugging Face's models rotate i and i + E / 2.
pub(super) fn reorder(config: &Config, parameter: Parameter, numbers: AlignedVec<f32>, way: Way) -> AlignedVec<f32> {
    let is_rotated = matches!(parameter, Parameter::QProj | Parameter::KProj);
    if !is_rotated || !matches!(config.family, Family::Llama | Family::Mistral) {
        return numbers;
    }
    let (row, dim) = (config.hidden_size, config.head_dim());
    let half = dim / 2;
    let from = |row: usize| {
        let (head, at) = (row / dim * dim, row % dim);
        head + match way {
            Way::ToFile => at / 2 + at % 2 * half,
            Way::FromFile => at % half * 2 + at / half,
        }
    };
    let mut reordered = AlignedVec::zeros(numbers.len());
    for (to, row_of) in reordered.chunks_exact_mut(row).enumerate() {
        row_of.copy_from_slice(&numbers[from(to) * row..][..row]);
    }
    reordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotated_pairs_of_a_llama_lie_side_by_side_in_the_file_and_come_back() {
        let config: Config = serde_json::from_value(serde_json::json!({"model_type": "llama", "hidden_size": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}))
        .unwrap();
        let rows: Vec<f32> = (0..8).flat_map(|row| [row as f32, -(row as f32)]).collect();
        let rows = AlignedVec::from(&rows[..]);
        let there = reorder(&config, Parameter::QProj, rows.clone(), Way::ToFile);
        let order: Vec<f32> = there.iter().step_by(2).copied().collect();
        assert_eq!(order, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(reorder(&config, Parameter::QProj, there, Way::FromFile), rows);
        assert_eq!(reorder(&config, Parameter::VProj, rows.clone(), Way::ToFile), rows);
    }
}
