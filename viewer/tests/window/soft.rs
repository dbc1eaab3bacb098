//! Draws what egui tessellates, by plain arithmetic: the same pixels on any machine, with a GPU or without.
//!
//! Triangles are sampled at the middles of pixels; an edge that two share belongs to one of them (the top-left rule), or glass
//! would show seams.  Corners are snapped to 1/256 of a pixel, so that which pixels a triangle covers is exact.  Colours are
//! blended as egui's own painters do: premultiplied, as they are stored.  Deliberately absent: callbacks, which we have none of.

use eframe::egui::epaint::{ImageData, ImageDelta, Mesh, Primitive, Vertex};
use eframe::egui::{Context, FullOutput, Pos2, Rect, TextureId, TexturesDelta};
use egui_kittest::TestRenderer;
use image::{Rgba, RgbaImage};
use std::collections::HashMap;

/// Parts of a pixel.
const PARTS: f32 = 256.0;

/// See the module's comment.
#[derive(Default)]
pub struct Soft {
    textures: HashMap<TextureId, Texture>,
}

struct Texture {
    size: [usize; 2],
    texels: Vec<[f32; 4]>,
}

impl Texture {
    /// The mean of the four nearest texels by distance; beyond the border its own repeat.
    fn at(&self, uv: [f32; 2]) -> [f32; 4] {
        let place = |axis: usize| -> ([usize; 2], f32) {
            let last = self.size[axis] as i64 - 1;
            let x = uv[axis] * self.size[axis] as f32 - 0.5;
            let low = x.floor();
            ([low as i64, low as i64 + 1].map(|i| i.clamp(0, last) as usize), x - low)
        };
        let ((xs, tx), (ys, ty)) = (place(0), place(1));
        let texel = |x: usize, y: usize, c: usize| self.texels[y * self.size[0] + x][c];
        std::array::from_fn(|c| {
            let row = |y: usize| texel(xs[0], y, c) * (1.0 - tx) + texel(xs[1], y, c) * tx;
            row(ys[0]) * (1.0 - ty) + row(ys[1]) * ty
        })
    }

    fn set(&mut self, delta: &ImageDelta) {
        let ImageData::Color(image) = &delta.image;
        let [x0, y0] = delta.pos.unwrap_or_default();
        for (i, p) in image.pixels.iter().enumerate() {
            let (x, y) = (x0 + i % image.size[0], y0 + i / image.size[0]);
            self.texels[y * self.size[0] + x] = p.to_array().map(f32::from);
        }
    }
}

impl TestRenderer for Soft {
    fn handle_delta(&mut self, delta: &mut TexturesDelta) {
        for (id, all) in std::mem::take(&mut delta.set) {
            for d in &all {
                if d.is_whole() {
                    let size = d.image.size();
                    self.textures.insert(id, Texture { size, texels: vec![[0.0; 4]; size[0] * size[1]] });
                }
                self.textures.get_mut(&id).expect("a texture is whole before parts of it change").set(d);
            }
        }
        for id in std::mem::take(&mut delta.free) {
            self.textures.remove(&id);
        }
    }

    fn render(&mut self, cx: &Context, output: &FullOutput) -> Result<RgbaImage, String> {
        let scale = cx.pixels_per_point();
        let size = cx.content_rect().size() * scale;
        let mut image = RgbaImage::from_pixel(size.x.round() as u32, size.y.round() as u32, Rgba([255; 4]));
        for p in cx.tessellate(output.shapes.clone(), scale) {
            let Primitive::Mesh(mesh) = &p.primitive else { return Err("a callback paints: not here".into()) };
            let texture = self.textures.get(&mesh.texture_id).ok_or("no such texture")?;
            draw(&mut image, mesh, texture, p.clip_rect, scale);
        }
        Ok(image)
    }
}

fn draw(image: &mut RgbaImage, mesh: &Mesh, texture: &Texture, clip: Rect, scale: f32) {
    let bound = |x: f32, most: u32| ((x * scale).round() as i64).clamp(0, i64::from(most));
    let [left, right] = [clip.min.x, clip.max.x].map(|x| bound(x, image.width()));
    let [top, bottom] = [clip.min.y, clip.max.y].map(|y| bound(y, image.height()));
    for corners in mesh.indices.chunks_exact(3) {
        let corners = [0, 1, 2].map(|i| &mesh.vertices[corners[i] as usize]);
        triangle(image, corners, texture, [left, top, right, bottom], scale);
    }
}

/// In parts of a pixel.
type Corner = [i64; 2];

/// Twice the area of `a`, `b`, `p`: positive where `p` lies to the left of the way from `a` to `b`, y down.
fn side(a: Corner, b: Corner, p: Corner) -> i64 {
    (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])
}

fn triangle(image: &mut RgbaImage, mut v: [&Vertex; 3], texture: &Texture, clip: [i64; 4], scale: f32) {
    let snap = |p: Pos2| -> Corner { [p.x, p.y].map(|x| (x * scale * PARTS).round() as i64) };
    let mut c = v.map(|v| snap(v.pos));
    let mut area = side(c[0], c[1], c[2]);
    if area == 0 {
        return;
    }
    if area < 0 {
        v.swap(1, 2);
        c.swap(1, 2);
        area = -area;
    }
    let parts = PARTS as i64;
    let reach = |axis: usize, low: i64, high: i64| {
        let (min, max) = (c.iter().map(|c| c[axis]).min().unwrap_or(0), c.iter().map(|c| c[axis]).max().unwrap_or(0));
        min.div_euclid(parts).max(low)..(max.div_euclid(parts) + 1).min(high)
    };
    // A pixel on an edge is inside if the edge is a top or a left one.
    let owned = |a: Corner, b: Corner| (b[1] == a[1] && b[0] > a[0]) || b[1] < a[1];
    let least = [(1, 2), (2, 0), (0, 1)].map(|(a, b)| i64::from(!owned(c[a], c[b])));
    for y in reach(1, clip[1], clip[3]) {
        for x in reach(0, clip[0], clip[2]) {
            let p = [x * parts + parts / 2, y * parts + parts / 2];
            let w = [side(c[1], c[2], p), side(c[2], c[0], p), side(c[0], c[1], p)];
            if (0..3).any(|i| w[i] < least[i]) {
                continue;
            }
            let w = w.map(|w| w as f32 / area as f32);
            let mix = |of: &dyn Fn(&Vertex) -> f32| w[0] * of(v[0]) + w[1] * of(v[1]) + w[2] * of(v[2]);
            let texel = texture.at([mix(&|v| v.uv.x), mix(&|v| v.uv.y)]);
            let colour: [f32; 4] = std::array::from_fn(|i| mix(&|v| f32::from(v.color[i])) * texel[i] / 255.0);
            let Rgba(under) = image.get_pixel_mut(x as u32, y as u32);
            for i in 0..4 {
                under[i] =
                    (colour[i] + f32::from(under[i]) * (1.0 - colour[3] / 255.0)).round().clamp(0.0, 255.0) as u8;
            }
        }
    }
}
