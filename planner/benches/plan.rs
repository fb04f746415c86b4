//! What one pass costs in a large fleet in the middle of a rollout: wanted are 20 ms for 5,000 nodes, and a cost that
//! grows as the nodes do. `cargo bench -p osimage-planner --bench plan`
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/large/mod.rs"]
mod large;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use osimage_planner::rollout;

fn plan(criterion: &mut Criterion) {
    for (name, budget) in [("one slot", IntOrString::Int(1)), ("slots for 2 %", IntOrString::String("2%".into()))] {
        let mut group = criterion.benchmark_group(format!("plan, {name}"));
        for nodes in [1_000, 5_000, 20_000] {
            let fleet = large::fleet(nodes, budget.clone());
            group.throughput(Throughput::Elements(nodes as u64));
            group.bench_with_input(BenchmarkId::from_parameter(nodes), &fleet, |bench, fleet| {
                bench.iter(|| (rollout::inspect(fleet, large::NOW), rollout::plan(fleet, large::NOW)));
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(std::time::Duration::from_secs(2));
    targets = plan
}
criterion_main!(benches);
