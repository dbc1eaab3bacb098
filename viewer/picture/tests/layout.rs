//! Layouts of any graph: boxes do not overlap, edges go to the right, the same graph lies the same.

mod support;

use proptest::prelude::*;
use rambac_ir::testing::grown;
use rambac_picture::fold::fold;
use rambac_picture::layout::{Layout, layout};
use rambac_picture::{ColourBy, Look, Open, Picture, Scene, export};
use support::{holds, picture_holds};

fn graphs() -> impl Strategy<Value = (Vec<[f64; 2]>, Vec<(usize, usize)>)> {
    (1usize..60).prop_flat_map(|n| {
        let sizes = proptest::collection::vec([1.0f64..200.0, 1.0..90.0], n);
        let edges = proptest::collection::vec((0..n, 0..n), 0..3 * n);
        (sizes, edges).prop_map(|(sizes, edges)| {
            let mut edges: Vec<_> =
                edges.into_iter().map(|(a, b)| (a.min(b), a.max(b))).filter(|e| e.0 < e.1).collect();
            edges.sort();
            edges.dedup();
            (sizes, edges)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_graph((sizes, edges) in graphs()) {
        let l = layout(&sizes, &edges);
        holds(&sizes, &edges, &l)?;
        prop_assert_eq!(l, layout(&sizes, &edges));
    }

    /// Graphs of every op, with layers at random: whatever is folded, boxes form no cycle and lose no node.
    #[test]
    fn grown_graphs(g in grown(40), layers in proptest::collection::vec(0usize..4, 400), open in any::<bool>()) {
        let mut graph = g.graph.clone();
        for (i, n) in graph.nodes.iter_mut().enumerate() {
            n.scope = [None, Some("layers.0".into()), Some("layers.1".into()), Some("grad.layers.1".into())]
                [layers[i % layers.len()]].clone();
        }
        let state = if open { Open::All } else { Open::default() };
        let v = fold(&graph, &state);
        let mut seen = vec![0; graph.nodes.len()];
        v.items.iter().flat_map(|i| &i.nodes).for_each(|n| seen[n.index()] += 1);
        prop_assert!(seen.iter().all(|s| *s == 1));
        let scene = Scene::new("grown", &graph, &g.dims).unwrap();
        for stage in [0, scene.last()] {
            let look = Look { stage, open: state.clone(), ..Look::default() };
            picture_holds(&Picture::new(&scene, &look))?;
            prop_assert_eq!(export::svg(&scene, &look), export::svg(&scene, &look));
        }
        let look = Look { stage: scene.last(), before: true, colour: ColourBy::Memory, open: state };
        let dot = export::dot(&scene, &look);
        prop_assert!(dot.ends_with('\n') && dot.starts_with("digraph"));
    }
}

#[test]
fn nothing_at_all() {
    assert_eq!(layout(&[], &[]), Layout::default());
}
