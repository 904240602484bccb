//! A statistics file, and a plan from it.
#![no_main]

mod file;

use libfuzzer_sys::fuzz_target;
use moepress::backend::Moment;
use moepress::calibrate::Statistics;
use moepress::plan::{Budget, Request, method};

fuzz_target!(|bytes: &[u8]| {
    let Ok(statistics) = Statistics::open(&file::file("statistics", bytes)) else { return };
    let _ = statistics.usage();
    for layer in &statistics.profile().moe_layers {
        let _ = statistics.moments(layer.layer, &Moment::ALL);
    }
    let Ok(moments) = statistics.first_moments() else { return };
    for budget in [Budget::Remove(0.5), Budget::Experts(2), Budget::Bytes(1000)] {
        let request = Request {
            statistics: Some(&moments),
            budget: Some(budget),
            options: &[("scope".to_string(), "global".to_string())].into(),
            ..Request::new(statistics.profile())
        };
        for name in ["reap", "seer-soft"] {
            let _ = method(name).expect("a method").plan(&request);
        }
    }
});
