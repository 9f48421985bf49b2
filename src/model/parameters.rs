//! A model's parameters by name: which there are, their shapes, and the order in which files, gradients and moments hold them.

use super::Config;

/// What a parameter is for, named after its field in Hugging Face's models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parameter {
    /// `(V, D)`.
    EmbedTokens,
    /// `(D)`, before attention.
    InputNorm,
    /// `(H E, D)`.
    QProj,
    /// `(H E)`, not in every family.
    QBias,
    /// `(K E, D)`.
    KProj,
    /// `(K E)`, not in every family.
    KBias,
    /// `(K E, D)`.
    VProj,
    /// `(K E)`, not in every family.
    VBias,
    /// `(E)`, of each query head before rope; not in every family.
    QNorm,
    /// `(E)`, of each key head before rope; not in every family.
    KNorm,
    /// `(D, H E)`.
    OProj,
    /// `(D)`, after attention.
    PostNorm,
    /// `(F, D)`.
    GateProj,
    /// `(F, D)`.
    UpProj,
    /// `(D, F)`.
    DownProj,
    /// `(D)`, after the last layer.
    FinalNorm,
    /// `(V, D)`, unless it is the embedding.
    LmHead,
}

impl Parameter {
    /// Its name in a checkpoint; in a layer `model.layers.{layer}.` comes before it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::EmbedTokens => "model.embed_tokens.weight",
            Self::InputNorm => "input_layernorm.weight",
            Self::QProj => "self_attn.q_proj.weight",
            Self::QBias => "self_attn.q_proj.bias",
            Self::KProj => "self_attn.k_proj.weight",
            Self::KBias => "self_attn.k_proj.bias",
            Self::VProj => "self_attn.v_proj.weight",
            Self::VBias => "self_attn.v_proj.bias",
            Self::QNorm => "self_attn.q_norm.weight",
            Self::KNorm => "self_attn.k_norm.weight",
            Self::OProj => "self_attn.o_proj.weight",
            Self::PostNorm => "post_attention_layernorm.weight",
            Self::GateProj => "mlp.gate_proj.weight",
            Self::UpProj => "mlp.up_proj.weight",
            Self::DownProj => "mlp.down_proj.weight",
            Self::FinalNorm => "model.norm.weight",
            Self::LmHead => "lm_head.weight",
        }
    }

    /// Whether it is the weight of a norm.
    #[must_use]
    pub fn is_norm(self) -> bool {
        matches!(self, Self::InputNorm | Self::QNorm | Self::KNorm | Self::PostNorm | Self::FinalNorm)
    }
}

/// A parameter and its shape: matrices `(out, in)`, vectors `(out)`.
type Shaped = (Parameter, Vec<usize>);

/// Parameters in order: those before the layers, those of each layer, those after the layers.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ParameterList {
    before: Vec<Shaped>,
    layer: Vec<Shaped>,
    layers: usize,
    after: Vec<Shaped>,
}

impl ParameterList {
    /// The place of a parameter outside the layers; `None` if the list lacks it.
    #[must_use]
    pub fn of_model(&self, parameter: Parameter) -> Option<usize> {
        let after = self.before.len() + self.layers * self.layer.len();
        place(&self.before, parameter).or_else(|| Some(after + place(&self.after, parameter)?))
    }

    /// The place of a parameter of layer `layer`; `None` if the list lacks it.
    #[must_use]
    pub fn of_layer(&self, layer: usize, parameter: Parameter) -> Option<usize> {
        Some(self.before.len() + layer * self.layer.len() + place(&self.layer, parameter)?)
    }

    /// The place of the LM head, which is the embedding's if the two are tied.
    #[must_use]
    pub fn of_head(&self) -> Option<usize> {
        self.of_model(Parameter::LmHead).or_else(|| self.of_model(Parameter::EmbedTokens))
    }

    /// Each parameter's layer, if it is in one, the parameter, and its shape.
    pub fn places(&self) -> impl Iterator<Item = (Option<usize>, Parameter, &[usize])> {
        fn of((parameter, shape): &Shaped, layer: Option<usize>) -> (Option<usize>, Parameter, &[usize]) {
            (layer, *parameter, shape)
        }
        let layers = (0..self.layers).flat_map(|layer| self.layer.iter().map(move |one| of(one, Some(layer))));
        self.before.iter().map(|one| of(one, None)).chain(layers).chain(self.after.iter().map(|one| of(one, None)))
    }

    /// Each parameter and its shape.
    pub fn iter(&self) -> impl Iterator<Item = (Parameter, &[usize])> {
        self.places().map(|(_, parameter, shape)| (parameter, shape))
    }

    /// Each parameter's whole name and its shape.
    #[must_use]
    pub fn named(&self) -> Vec<(String, Vec<usize>)> {
        let name = |layer: Option<usize>, parameter: Parameter| match layer {
            Some(layer) => format!("model.layers.{layer}.{}", parameter.name()),
            None => parameter.name().to_owned(),
        };
        self.places().map(|(layer, parameter, shape)| (name(layer, parameter), shape.to_vec())).collect()
    }
}

fn place(among: &[Shaped], parameter: Parameter) -> Option<usize> {
    among.iter().position(|(other, _)| *other == parameter)
}

impl Config {
    /// What a checkpoint stores, in its order; an LM head that is the embedding is stored once.
    #[must_use]
    pub fn stored(&self) -> ParameterList {
        let (d, vocabulary) = (self.hidden_size, self.vocab_size);
        let mut after = vec![(Parameter::FinalNorm, vec![d])];
        if !self.tie_word_embeddings {
            after.push((Parameter::LmHead, vec![vocabulary, d]));
        }
        let before = vec![(Parameter::EmbedTokens, vec![vocabulary, d])];
        ParameterList { before, layer: self.layer_parameters(), layers: self.num_hidden_layers, after }
    }

    /// What has a gradient and moments and is updated, unless an adapter is trained: all that is stored.
    #[must_use]
    pub fn trainable(&self) -> ParameterList {
        self.stored()
    }

    fn layer_parameters(&self) -> Vec<Shaped> {
        use Parameter::*;
        let (d, f, q, kv) = (self.hidden_size, self.intermediate_size, self.attention_width(), self.kv_width());
        let mut list = vec![(InputNorm, vec![d])];
        for (weight, bias, width) in [(QProj, QBias, q), (KProj, KBias, kv), (VProj, VBias, kv)] {
            list.push((weight, vec![width, d]));
            if self.qkv_bias {
                list.push((bias, vec![width]));
            }
        }
        if self.qk_norm {
            list.extend([(QNorm, vec![self.head_dim()]), (KNorm, vec![self.head_dim()])]);
        }
        list.extend([
            (OProj, vec![d, q]),
            (PostNorm, vec![d]),
            (GateProj, vec![f, d]),
            (UpProj, vec![f, d]),
            (DownProj, vec![d, f]),
        ]);
        list
    }

    /// What all stored parameters take in f32 (bytes).
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        4 * self
            .stored()
            .iter()
            .map(|(_, shape)| shape.iter().map(|&length| length as u64).product::<u64>())
            .sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(changed: &str) -> Config {
        let mut json = serde_json::json!({
            "model_type": "qwen2", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1
        });
        json["tie_word_embeddings"] = (changed == "tied").into();
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn places_are_those_of_the_names_with_and_without_biases_norms_and_head() {
        for tied in ["tied", ""] {
            for (qkv_bias, qk_norm) in [(true, false), (false, true)] {
                let list = Config { qkv_bias, qk_norm, ..config(tied) }.stored();
                let names: Vec<String> = list.named().into_iter().map(|(name, _)| name).collect();
                let at = |name: &str| names.iter().position(|other| other == name);
                assert_eq!(list.of_layer(2, Parameter::OProj), at("model.layers.2.self_attn.o_proj.weight"));
                assert_eq!(list.of_layer(1, Parameter::KBias), at("model.layers.1.self_attn.k_proj.bias"));
                assert_eq!(list.of_layer(1, Parameter::KBias).is_some(), qkv_bias);
                assert_eq!(list.of_layer(1, Parameter::QNorm), at("model.layers.1.self_attn.q_norm.weight"));
                assert_eq!(list.of_layer(1, Parameter::QNorm).is_some(), qk_norm);
                assert_eq!(list.of_model(Parameter::FinalNorm), at("model.norm.weight"));
                assert_eq!(list.of_head(), at("lm_head.weight").or(Some(0)));
                assert_eq!(list.iter().count(), names.len());
            }
        }
    }

    #[test]
    fn heads_may_be_of_another_width_than_the_stream_divided_by_them() {
        let config = Config { head_dim: Some(6), ..config("tied") };
        assert_eq!((config.attention_width(), config.kv_width()), (12, 6));
        let list = config.stored();
        let shape = |parameter| list.iter().nth(list.of_layer(0, parameter).unwrap()).unwrap().1.to_vec();
        assert_eq!(shape(Parameter::QProj), [12, 8]);
        assert_eq!(shape(Parameter::VProj), [6, 8]);
        assert_eq!(shape(Parameter::OProj), [8, 12]);
    }
}
