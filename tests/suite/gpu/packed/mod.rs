//! Packed sequences on the shim against the CPU's model and plain twins.

mod adapter;
mod attention;
mod backward;
mod forward;
mod loss_scale;
mod training;

use grpo_pipes::model::{Config, Model, Packed};

/// A shape whose widths are odd in the units of the kernels, with a scaled rope and a padding token; H and K heads of E, tied or not.
fn model([heads, kv_heads, dim]: [usize; 3], tied: bool) -> Model {
    let config: Config = serde_json::from_value(serde_json::json!({
        "model_type": "qwen2", "vocab_size": 43, "hidden_size": heads * dim, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 200, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": tied, "initializer_range": 0.1, "pad_token_id": 7,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}
    }))
    .unwrap();
    let mut model = Model::random(config, 3);
    for (i, parameter) in model.parameters_mut().into_iter().enumerate() {
        parameter.iter_mut().enumerate().for_each(|(j, x)| *x += 0.05 * ((i * 31 + j * 7) as f32).sin());
    }
    model
}

/// Sequences of these lengths; those with a prefix go on from the last one without.
fn packed(lengths: &[(usize, bool)]) -> Packed {
    let mut packed = Packed { starts: vec![0], ..Packed::default() };
    let mut bundle = None;
    for (i, &(length, goes_on)) in lengths.iter().enumerate() {
        bundle = if goes_on { bundle } else { Some(i) };
        packed.tokens.extend((0..length).map(|t| ((t * t * 7 + t * 13 + i * 29) % 43) as u32));
        packed.starts.push(packed.tokens.len());
        packed.prefixes.push(bundle.filter(|_| goes_on));
    }
    packed
}

/// The same with each sequence's prefix computed for it alone, and for each row of `packed` one that must be the same.
fn unshared(packed: &Packed) -> (Packed, Vec<usize>) {
    let (mut plain, mut rows) = (Packed { starts: vec![0], ..Packed::default() }, Vec::new());
    for (i, prefix) in packed.prefixes.iter().enumerate() {
        let of = |i: usize| packed.tokens[packed.starts[i]..packed.starts[i + 1]].iter();
        plain.tokens.extend(prefix.iter().flat_map(|prefix| of(*prefix)));
        let first = plain.tokens.len();
        plain.tokens.extend(of(i));
        rows.extend(first..plain.tokens.len());
        plain.starts.push(plain.tokens.len());
        plain.prefixes.push(None);
    }
    (plain, rows)
}

/// A group with completions of several lengths between two sequences of their own.
fn bundle() -> Packed {
    packed(&[(3, false), (17, false), (20, true), (1, true), (8, true), (6, false)])
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
