//! From JSON to a plan, with errors that name layer, expert and field.

use serde_json::{Map, Value};

use super::error::Place;
use super::file::{ExpertPlan, LayerPlan, MergedRows, ModelRef, StatisticsRef, VERSION};
use super::{Action, Channels, Expected, Options, Plan, Ranks, Result};
use crate::architecture::{Skip, SkipThreshold};

/// The plan that `value` describes; sorted, but not yet checked for contradictions.
pub(super) fn plan(value: &Value) -> Result<Plan> {
    let file = Object::new(value, Place::top())?;
    let version = file.number("moepress")?;
    if version != VERSION {
        let problem = format!("version {version}; this program reads version {VERSION}");
        return Err(file.place.field("moepress").plan(problem));
    }
    file.only(&["moepress", "method", "options", "model", "statistics", "layers", "expected"])?;
    let mut layers = file.array("layers")?.iter().map(layer).collect::<Result<Vec<_>>>()?;
    layers.sort_by_key(|l| l.layer);
    Ok(Plan {
        version,
        method: file.text("method")?,
        options: file.object("options")?.map.clone().into_iter().collect::<Options>(),
        model: model(&file.object("model")?)?,
        statistics: match file.get("statistics")? {
            Value::Null => None,
            _ => Some(statistics(&file.object("statistics")?)?),
        },
        layers,
        expected: expected(&file.object("expected")?)?,
        warnings: Vec::new(),
    })
}

fn model(object: &Object<'_>) -> Result<ModelRef> {
    object.only(&["family", "identity"])?;
    Ok(ModelRef { family: object.text("family")?, identity: object.text("identity")? })
}

fn statistics(object: &Object<'_>) -> Result<StatisticsRef> {
    object.only(&["file", "sha256", "tokens"])?;
    Ok(StatisticsRef {
        file: object.text("file")?,
        sha256: object.text("sha256")?,
        tokens: object.number("tokens")?,
    })
}

fn expected(object: &Object<'_>) -> Result<Expected> {
    object.only(&[
        "parameters",
        "routed_parameters",
        "bytes",
        "routed_bytes",
        "removed_fraction",
        "experts",
    ])?;
    Ok(Expected {
        parameters: object.number("parameters")?,
        routed_parameters: object.number("routed_parameters")?,
        bytes: object.number("bytes")?,
        routed_bytes: object.number("routed_bytes")?,
        removed_fraction: object.real("removed_fraction")?,
        experts: object.number("experts")?,
    })
}

fn layer(value: &Value) -> Result<LayerPlan> {
    let number = Object::new(value, Place::top().field("layers"))?.index("layer")?;
    let object = Object::new(value, Place::layer(number))?;
    object.only(&["layer", "top_k", "skip", "loss", "experts", "protected", "router"])?;
    let loss = object.map.get("loss").map(|_| object.real("loss")).transpose()?;
    let read = |value| expert(value, &object.place);
    let mut experts = object.array("experts")?.iter().map(read).collect::<Result<Vec<_>>>()?;
    experts.sort_by_key(|e| e.expert);
    let protected = match object.map.get("protected") {
        Some(_) => object.indices("protected")?,
        None => Vec::new(),
    };
    let skip = match object.map.get("skip") {
        Some(_) => Some(skip(&object.object("skip")?)?),
        None => None,
    };
    let router = match object.map.get("router").and_then(Value::as_str) {
        Some("redirect") => MergedRows::Redirect,
        Some("fuse") => MergedRows::Fuse,
        None if !object.map.contains_key("router") => MergedRows::default(),
        _ => {
            let value = object.get("router")?;
            return Err(wrong(&object.place.field("router"), value, "\"redirect\" or \"fuse\""));
        }
    };
    Ok(LayerPlan { layer: number, top_k: object.index("top_k")?, skip, experts, loss, protected, router })
}

fn skip(object: &Object<'_>) -> Result<Skip> {
    object.only(&["ratio", "tail", "rescale"])?;
    let threshold = match (object.map.get("ratio"), object.map.get("tail")) {
        (Some(_), None) => SkipThreshold::Ratio(object.real("ratio")?),
        (None, Some(_)) => SkipThreshold::Tail(object.real("tail")?),
        _ => return Err(object.place.clone().plan("give either ratio or tail")),
    };
    let rescale = match object.map.get("rescale") {
        None => true,
        Some(Value::Bool(rescale)) => *rescale,
        Some(other) => return Err(wrong(&object.place.field("rescale"), other, "true or false")),
    };
    Ok(Skip { threshold, rescale })
}

fn expert(value: &Value, layer: &Place) -> Result<ExpertPlan> {
    let number = Object::new(value, layer.field("experts"))?.index("expert")?;
    let object = Object::new(value, layer.expert(number))?;
    Ok(ExpertPlan { expert: number, action: action(&object)? })
}

fn action(object: &Object<'_>) -> Result<Action> {
    let fields = |names: &[&str]| object.only(&[&["expert", "action"], names].concat());
    match object.text("action")?.as_str() {
        "keep" => fields(&[]).map(|()| Action::Keep),
        "drop" => fields(&[]).map(|()| Action::Drop),
        "constant" => fields(&[]).map(|()| Action::Constant),
        "merge" => {
            fields(&["into", "weight"])?;
            Ok(Action::Merge { into: object.index("into")?, weight: object.real("weight")? })
        }
        "low_rank" => {
            fields(&["rank", "rows"])?;
            let rows = object.map.contains_key("rows").then(|| ranks(object, "rows")).transpose()?;
            Ok(Action::LowRank { rank: ranks(object, "rank")?, rows: rows.unwrap_or_default() })
        }
        "channels" => {
            fields(&["keep"])?;
            let keep = match object.get("keep")? {
                Value::Array(_) => Channels::List(object.indices("keep")?),
                _ => Channels::Count(object.index("keep")?),
            };
            Ok(Action::Channels { keep })
        }
        "delta" => fields(&["rank"]).and_then(|()| Ok(Action::Delta { rank: object.index("rank")? })),
        other => {
            let known = "keep, drop, merge, constant, low_rank, channels, delta";
            Err(object
                .place
                .field("action")
                .plan(format!("unknown action `{other}`; known actions: {known}")))
        }
    }
}

/// One number for each matrix; absent or null where there is none.
fn ranks(object: &Object<'_>, field: &str) -> Result<Ranks> {
    let ranks = object.object(field)?;
    ranks.only(&["gate", "up", "down"])?;
    let rank = |name| match ranks.map.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(_) => ranks.index(name).map(Some),
    };
    Ok(Ranks { gate: rank("gate")?, up: rank("up")?, down: rank("down")? })
}

/// A JSON object and where it stands in the plan.
struct Object<'a> {
    map: &'a Map<String, Value>,
    place: Place,
}

impl<'a> Object<'a> {
    fn new(value: &'a Value, place: Place) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Object { map, place }),
            other => Err(wrong(&place, other, "an object")),
        }
    }

    /// Refuses fields that are not among `known`: a misspelt one must not be passed over.
    fn only(&self, known: &[&str]) -> Result<()> {
        match self.map.keys().find(|key| !known.contains(&key.as_str())) {
            Some(key) => {
                Err(self.place.field(key).plan(format!("unknown field; known here: {}", known.join(", "))))
            }
            None => Ok(()),
        }
    }

    fn get(&self, name: &str) -> Result<&'a Value> {
        self.map.get(name).ok_or_else(|| self.place.field(name).plan("this field is missing"))
    }

    fn number(&self, name: &str) -> Result<u64> {
        let value = self.get(name)?;
        value.as_u64().ok_or_else(|| wrong(&self.place.field(name), value, "a whole number, 0 or more"))
    }

    fn index(&self, name: &str) -> Result<usize> {
        Ok(self.number(name)? as usize)
    }

    fn real(&self, name: &str) -> Result<f64> {
        let value = self.get(name)?;
        value.as_f64().ok_or_else(|| wrong(&self.place.field(name), value, "a number"))
    }

    fn text(&self, name: &str) -> Result<String> {
        let value = self.get(name)?;
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| wrong(&self.place.field(name), value, "a string"))
    }

    fn array(&self, name: &str) -> Result<&'a [Value]> {
        let value = self.get(name)?;
        let array = value.as_array().map(Vec::as_slice);
        array.ok_or_else(|| wrong(&self.place.field(name), value, "an array"))
    }

    fn indices(&self, name: &str) -> Result<Vec<usize>> {
        let item = |value: &Value| {
            let index = value.as_u64().map(|i| i as usize);
            index.ok_or_else(|| wrong(&self.place.field(name), value, "whole numbers, 0 or more"))
        };
        self.array(name)?.iter().map(item).collect()
    }

    fn object(&self, name: &str) -> Result<Object<'a>> {
        Object::new(self.get(name)?, self.place.field(name))
    }
}

/// The error for a value of the wrong kind.
fn wrong(place: &Place, value: &Value, expected: &str) -> super::Error {
    let mut found = value.to_string();
    if found.chars().count() > 40 {
        found = found.chars().take(40).chain("…".chars()).collect();
    }
    place.clone().plan(format!("found {found}, expected {expected}"))
}
