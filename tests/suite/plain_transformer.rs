//! The slow, plain transformer in f64 that the fast one is compared with: one sequence, no cache, no blocks, straight from the equations.

use std::collections::HashMap;

use grpo_pipes::model::{Config, Model, Scaling};

/// Named parameters in f64.
pub struct PlainTransformer {
    config: Config,
    /// Cosines, then sines, where the rope is a scaled one; `rope.rs` compares those with transformers.
    table: Option<Vec<f32>>,
    pub parameters: HashMap<String, Vec<f64>>,
}

impl PlainTransformer {
    pub fn of(model: &Model) -> Self {
        let names = model.config().stored().named().into_iter().map(|(name, _)| name);
        let values = model.parameters().into_iter().map(|p| p.iter().map(|&x| f64::from(x)).collect());
        let config = model.config().clone();
        let scaled = config.rope.scaling != Scaling::Default;
        Self {
            table: scaled.then(|| model.rope_table(config.positions())),
            config,
            parameters: names.zip(values).collect(),
        }
    }

    /// Logits of every position, `(T, V)`.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let c = &self.config;
        let embedding = self.matrix("model.embed_tokens.weight", c.hidden_size);
        let mut x: Vec<Vec<f64>> = tokens.iter().map(|&token| embedding[token as usize].clone()).collect();
        for layer in 0..c.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let normed = self.norm(&x, &name("input_layernorm.weight"));
            let attended = self.attention(&normed, layer);
            add(&mut x, &self.linear(&attended, &name("self_attn.o_proj")));
            let normed = self.norm(&x, &name("post_attention_layernorm.weight"));
            let (gate, up) = (self.linear(&normed, &name("mlp.gate_proj")), self.linear(&normed, &name("mlp.up_proj")));
            let silu = |g: f64| g / (1.0 + (-g).exp());
            let act: Vec<Vec<f64>> =
                gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(|(g, u)| silu(*g) * u).collect()).collect();
            add(&mut x, &self.linear(&act, &name("mlp.down_proj")));
        }
        let normed = self.norm(&x, "model.norm.weight");
        self.linear(&normed, if c.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" })
    }

    /// Log-probability of each next token, `(T - 1)`.
    pub fn logprobs(&self, tokens: &[u32], temperature: f64) -> Vec<f64> {
        let logits = self.logits(tokens);
        let of = |(row, &token): (&Vec<f64>, &u32)| {
            let sum: f64 = row.iter().map(|z| (z / temperature).exp()).sum();
            row[token as usize] / temperature - sum.ln()
        };
        logits.iter().zip(&tokens[1..]).map(of).collect()
    }

    fn attention(&self, x: &[Vec<f64>], layer: usize) -> Vec<Vec<f64>> {
        let c = &self.config;
        let (h, e) = (c.num_attention_heads, c.head_dim());
        let project = |part: &str| self.linear(x, &format!("model.layers.{layer}.self_attn.{part}_proj"));
        let (mut q, mut k, v) = (project("q"), project("k"), project("v"));
        for (rows, norm) in [(&mut q, "q_norm"), (&mut k, "k_norm")] {
            if c.qk_norm {
                let name = format!("model.layers.{layer}.self_attn.{norm}.weight");
                let heads =
                    |row: &Vec<f64>| self.norm(&row.chunks(e).map(<[f64]>::to_vec).collect::<Vec<_>>(), &name).concat();
                *rows = rows.iter().map(heads).collect();
            }
            rows.iter_mut().enumerate().for_each(|(t, row)| row.chunks_mut(e).for_each(|head| self.rotate(head, t)));
        }
        let attend = |t: usize, head: usize| -> Vec<f64> {
            let (own, shared) = (head * e, head / (h / c.num_key_value_heads) * e);
            let score = |s: usize| (0..e).map(|i| q[t][own + i] * k[s][shared + i]).sum::<f64>() / (e as f64).sqrt();
            let weights: Vec<f64> = (0..=t).map(|s| score(s).exp()).collect();
            let sum: f64 = weights.iter().sum();
            (0..e).map(|i| weights.iter().enumerate().map(|(s, w)| w / sum * v[s][shared + i]).sum()).collect()
        };
        (0..x.len()).map(|t| (0..h).flat_map(|head| attend(t, head)).collect()).collect()
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let half = head.len() / 2;
        for i in 0..half {
            let frequency = self.config.rope.rope_theta.powf(-(2.0 * i as f64) / head.len() as f64);
            let (mut sin, mut cos) = (position as f64 * frequency).sin_cos();
            if let Some(table) = &self.table {
                let at = position * half + i;
                (cos, sin) = (f64::from(table[at]), f64::from(table[table.len() / 2 + at]));
            }
            let (a, b) = (head[i], head[half + i]);
            head[i] = a * cos - b * sin;
            head[half + i] = b * cos + a * sin;
        }
    }

    fn norm(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let (w, epsilon) = (&self.parameters[name], f64::from(self.config.rms_norm_eps));
        let row = |x: &Vec<f64>| {
            let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + epsilon).sqrt();
            x.iter().zip(w).map(|(x, w)| x / rms * w).collect()
        };
        x.iter().map(row).collect()
    }

    fn linear(&self, x: &[Vec<f64>], name: &str) -> Vec<Vec<f64>> {
        let weight = self.matrix(&format!("{name}.weight"), x[0].len());
        let bias = self.parameters.get(&format!("{name}.bias"));
        let cell = |x: &Vec<f64>, n: usize| {
            x.iter().zip(&weight[n]).map(|(x, w)| x * w).sum::<f64>() + bias.map_or(0.0, |bias| bias[n])
        };
        x.iter().map(|x| (0..weight.len()).map(|n| cell(x, n)).collect()).collect()
    }

    fn matrix(&self, name: &str, width: usize) -> Vec<Vec<f64>> {
        self.parameters[name].chunks(width).map(<[f64]>::to_vec).collect()
    }
}

fn add(x: &mut [Vec<f64>], y: &[Vec<f64>]) {
    x.iter_mut().zip(y).for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += y));
}
