//! What a graph looks like, without a window: folding of layers, layout, colours, pictures as SVG, PNG and DOT, the memory
//! plan, and what the viewer tells of a node.
//!
//! ```text
//! Graph ─ passes → Scene ─ fold → View ─ layout → Picture ─→ svg, dot, the window
//! ```
//! Deliberately absent: windows, fonts' measures (letters are taken to be equally wide), and any change to a graph.

pub mod detail;
pub mod export;
pub mod family;
pub mod fold;
pub mod layout;
pub mod memory;
pub mod number;
pub mod picture;
pub mod raster;
pub mod scene;

pub use family::ColourBy;
pub use fold::Open;
pub use picture::{Look, Picture};
pub use scene::Scene;
