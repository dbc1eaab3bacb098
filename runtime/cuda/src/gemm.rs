//! Dense products by cuBLASLt.
//!
//! The library thinks in columns: a row-major matrix is to it the transposed one, so `c = a·b` is asked for as
//! `cᵀ = bᵀ·aᵀ`.  Layouts and the algorithm are kept per shape.  The algorithm is the first that the library's heuristics
//! name, or by a rule of ours one of the first few (see [`pick`]), never one that was measured: the same machine gives the same bits.

use crate::api::check;
use crate::library::cublaslt;
use cudarc::cublaslt::result::{self as lt, CublasError};
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t as Compute, cublasLtMatmulDescAttributes_t as DescAttribute,
    cublasLtMatmulPreferenceAttributes_t as PrefAttribute, cublasLtMatrixLayoutAttribute_t as LayoutAttribute,
    cublasStatus_t as Status, cudaDataType,
};
use cudarc::driver::sys::{self as driver, CUdeviceptr, CUresult, CUstream};
use rambac_driver::{Error, Float, Matrix, Product, Result};
use std::collections::HashMap;
use std::ffi::c_void;
use std::path::PathBuf;

/// Bytes that an algorithm may use beside its operands: with half of it products over many rows (weights' gradients) were slower by up to
/// a sixth on an H200.
const WORKSPACE: usize = 64 << 20;

/// Partial sums of a product that is cut along k are added in f32, in workspace and in a fixed order; never in place.
const REDUCTION: u32 = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;

/// Algorithms that the library is asked to name.
const NAMED: usize = 8;

/// All that an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    operands: [Operand; 3],
    plus: Option<Operand>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Operand {
    float: Float,
    ld: usize,
    step: usize,
    trans: bool,
    /// Of the address, in bytes: a power of two.
    alignment: u32,
}

impl Operand {
    fn new(x: &Matrix, address: CUdeviceptr) -> Operand {
        // The library asks for no more than this.
        let alignment = 1u32 << address.trailing_zeros().min(8);
        Operand { float: x.float, ld: x.ld, step: x.step, trans: x.trans, alignment }
    }
    /// As the library sees it.
    fn layout(&self, rows: usize, cols: usize, batch: usize) -> Outcome<Layout> {
        let (rows, cols) = if self.trans { (cols, rows) } else { (rows, cols) };
        // A single row may say any distance; the library wants one that holds a row.
        let ld = if rows == 1 { self.ld.max(cols) } else { self.ld };
        let l = Layout(lt::create_matrix_layout(data_type(self.float), cols as u64, rows as u64, ld as i64)?);
        if batch > 1 {
            l.set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &(batch as i32))?;
            l.set(LayoutAttribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &(self.step as i64))?;
        }
        Ok(l)
    }
}

fn data_type(f: Float) -> cudaDataType {
    match f {
        Float::F32 => cudaDataType::CUDA_R_32F,
        Float::Bf16 => cudaDataType::CUDA_R_16BF,
        Float::F16 => cudaDataType::CUDA_R_16F,
    }
}

type Outcome<T> = std::result::Result<T, CublasError>;

/// Handles that go back to the library.
struct Layout(sys::cublasLtMatrixLayout_t);
struct Description(sys::cublasLtMatmulDesc_t);
struct Preference(sys::cublasLtMatmulPreference_t);

impl Layout {
    fn set<T>(&self, which: LayoutAttribute, value: &T) -> Outcome<()> {
        // SAFETY: a live layout; the value has the size that is told.
        unsafe { lt::set_matrix_layout_attribute(self.0, which, (&raw const *value).cast(), size_of::<T>()) }
    }
}
impl Description {
    fn set<T>(&self, which: DescAttribute, value: &T) -> Outcome<()> {
        // SAFETY: as above.
        unsafe { lt::set_matmul_desc_attribute(self.0, which, (&raw const *value).cast(), size_of::<T>()) }
    }
}
impl Preference {
    fn set<T>(&self, which: PrefAttribute, value: &T) -> Outcome<()> {
        // SAFETY: as above.
        unsafe { lt::set_matmul_pref_attribute(self.0, which, (&raw const *value).cast(), size_of::<T>()) }
    }
}
impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by the library and given back once.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}
impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}
impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}

/// What is kept per key.
struct Chosen {
    description: Description,
    /// Of b, a, what is added, and c: the library's first, second, third and result.
    layouts: [Layout; 4],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The library with its workspace.
pub struct Gemm {
    handle: sys::cublasLtHandle_t,
    workspace: CUdeviceptr,
    chosen: HashMap<Key, Chosen>,
}

fn failed(e: CublasError) -> Error {
    let what = format!("cuBLASLt fails ({:?})", e.0);
    match e.0 {
        // A fault of an earlier launch shows here too.
        Status::CUBLAS_STATUS_EXECUTION_FAILED | Status::CUBLAS_STATUS_INTERNAL_ERROR => {
            // SAFETY: no arguments.
            match check("a product", unsafe { driver::cuCtxSynchronize() }) {
                Err(lost @ Error::Lost { .. }) => lost,
                _ => Error::refused(what),
            }
        }
        _ => Error::refused(what),
    }
}

impl Gemm {
    /// Loads the library; the device's context must be current.
    ///
    /// # Errors
    /// It is not here; no memory for workspace.
    pub fn new(libraries: &[PathBuf]) -> Result<Gemm> {
        cublaslt(libraries)?;
        let handle = lt::create_handle().map_err(failed)?;
        let mut workspace = 0;
        // SAFETY: a valid pointer.
        let code = unsafe { driver::cuMemAlloc_v2(&raw mut workspace, WORKSPACE) };
        if code != CUresult::CUDA_SUCCESS {
            // SAFETY: it was made above.
            let _ = unsafe { lt::destroy_handle(handle) };
            if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                return Err(Error::OutOfMemory { name: "workspace of products".into(), asked: WORKSPACE, free: None });
            }
            check("cuMemAlloc", code)?;
        }
        Ok(Gemm { handle, workspace, chosen: HashMap::new() })
    }

    /// Starts a product whose matrices are at these addresses.
    ///
    /// # Errors
    /// No algorithm takes it.
    ///
    /// # Safety
    /// The context of the addresses is current, and all elements lie in memory that is allocated.
    pub unsafe fn start(
        &mut self,
        p: &Product,
        [a, b, c]: [CUdeviceptr; 3],
        plus: Option<CUdeviceptr>,
        stream: CUstream,
    ) -> Result<()> {
        let refuse = |what: &str| Err(Error::refused(format!("a product {}×{}×{}: {what}", p.m, p.n, p.k)));
        if p.c.trans {
            return refuse("its result can't be transposed");
        }
        if p.a.float != p.b.float {
            return refuse("its operands must have one type");
        }
        if p.plus.is_some_and(|x| x.trans || x.float != p.c.float) {
            return refuse("what is added must have the result's type, and can't be transposed");
        }
        if p.k == 0 {
            return match plus {
                None => zero(p, c, stream),
                Some(x) if x == c => Ok(()),
                Some(_) => refuse("a sum of nothing and a matrix elsewhere"),
            };
        }
        let operands = [Operand::new(&p.a, a), Operand::new(&p.b, b), Operand::new(&p.c, c)];
        let added = plus.unwrap_or(c);
        let plus = p.plus.map(|x| Operand::new(&x, added));
        let key = Key { batch: p.batch, m: p.m, n: p.n, k: p.k, operands, plus };
        if !self.chosen.contains_key(&key) {
            let chosen = match choose(self.handle, &key) {
                Err(CublasError(Status::CUBLAS_STATUS_NOT_SUPPORTED)) => {
                    let Matrix { float, ld, .. } = p.a;
                    return refuse(&format!(
                        "cuBLASLt has no algorithm for {float:?} to {:?} (rows {ld} apart)",
                        p.c.float
                    ));
                }
                chosen => chosen.map_err(failed)?,
            };
            self.chosen.insert(key, chosen);
        }
        let x = &self.chosen[&key];
        let (one, beta) = (1f32, if p.plus.is_some() { 1f32 } else { 0.0 });
        let scalar = |v: &f32| (&raw const *v).cast::<c_void>();
        let [first, second, third, result] = &x.layouts;
        // SAFETY: live handles; the caller vouches for the addresses; the workspace is as large as the choice was told.
        let done = unsafe {
            lt::matmul(
                self.handle,
                x.description.0,
                scalar(&one),
                scalar(&beta),
                b as *const c_void,
                first.0,
                a as *const c_void,
                second.0,
                added as *const c_void,
                third.0,
                c as *mut c_void,
                result.0,
                &raw const x.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        done.map_err(failed)
    }
}

fn choose(handle: sys::cublasLtHandle_t, key: &Key) -> Outcome<Chosen> {
    let description = Description(lt::create_matmul_desc(Compute::CUBLAS_COMPUTE_32F, cudaDataType::CUDA_R_32F)?);
    let [a, b, c] = &key.operands;
    let op = |x: &Operand| x.trans as i32;
    description.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA, &op(b))?;
    description.set(DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB, &op(a))?;
    let plus = key.plus.as_ref().unwrap_or(c);
    let layouts = [
        b.layout(key.k, key.n, key.batch)?,
        a.layout(key.m, key.k, key.batch)?,
        plus.layout(key.m, key.n, key.batch)?,
        c.layout(key.m, key.n, key.batch)?,
    ];
    let preference = Preference(lt::create_matmul_pref()?);
    preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
    preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &REDUCTION)?;
    preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &b.alignment)?;
    preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &a.alignment)?;
    preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &plus.alignment)?;
    preference.set(PrefAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &c.alignment)?;
    let [first, second, third, result] = &layouts;
    let (mut named, mut count) = (Vec::with_capacity(NAMED), 0);
    // SAFETY: live handles; the library writes the first `count` of `NAMED` results.
    unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            description.0,
            first.0,
            second.0,
            third.0,
            result.0,
            preference.0,
            NAMED as i32,
            named.as_mut_ptr(),
            &raw mut count,
        )
        .result()?;
        named.set_len(usize::try_from(count).unwrap_or(0).min(NAMED));
    }
    named.retain(|x: &sys::cublasLtMatmulHeuristicResult_t| x.state == Status::CUBLAS_STATUS_SUCCESS);
    match pick(key, &named) {
        Some(x) => Ok(Chosen { description, layouts, algorithm: x.algo }),
        None => Err(CublasError(Status::CUBLAS_STATUS_NOT_SUPPORTED)),
    }
}

/// The first of the algorithms; where something in f32 is added, the one with the smallest tiles.  What is added is read when a tile
/// ends, and the large tiles that the library prefers leave nothing to do meanwhile (seen on an H200 at 32,768 × 1,024 × 2,048: 284 µs
/// by the first, 203 by the smallest).  Where the GPU is not filled once, small tiles gain nothing.
fn pick<'a>(
    key: &Key,
    named: &'a [sys::cublasLtMatmulHeuristicResult_t],
) -> Option<&'a sys::cublasLtMatmulHeuristicResult_t> {
    let first = named.first()?;
    if key.plus.is_none_or(|x| x.float != Float::F32) || first.wavesCount < 1.0 {
        return Some(first);
    }
    named.iter().reduce(|best, x| if x.wavesCount > best.wavesCount { x } else { best })
}

/// A sum of nothing.
fn zero(p: &Product, c: CUdeviceptr, stream: CUstream) -> Result<()> {
    let width = p.c.float.bytes();
    for g in 0..p.batch {
        for i in 0..p.m {
            let at = c + ((g * p.c.step + i * p.c.ld) * width) as u64;
            // SAFETY: the caller vouches for all elements.
            check("cuMemsetD8Async", unsafe { driver::cuMemsetD8Async(at, 0, p.n * width, stream) })?;
        }
    }
    Ok(())
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.chosen.clear();
        // SAFETY: both were made in `new` and are given back once; the context is current.
        unsafe {
            let _ = lt::destroy_handle(self.handle);
            driver::cuMemFree_v2(self.workspace);
        }
    }
}
