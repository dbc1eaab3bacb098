//! Row-strided matrices: how kernels see token-major tensors without copying slices of them.
//!
//! A tensor `[N, L, ...]` is a matrix of `N * L` rows; a slice of its last axis is the same matrix with
//! fewer columns and the same stride.  Row-major, stride in elements, `stride >= cols`.

use std::marker::PhantomData;

/// A shared row-strided matrix of `T`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T = f32> {
    ptr: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a [T]>,
}

/// An exclusive row-strided matrix of `T`.  Elements between a row's end and the next row's start are never touched.
pub struct MatMut<'a, T = f32> {
    ptr: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a `Mat` is a shared borrow of plain data, a `MatMut` an exclusive one.
unsafe impl<T: Sync> Send for Mat<'_, T> {}
unsafe impl<T: Sync> Sync for Mat<'_, T> {}
unsafe impl<T: Send> Send for MatMut<'_, T> {}
unsafe impl<T: Sync> Sync for MatMut<'_, T> {}

impl<'a, T> Mat<'a, T> {
    /// A contiguous matrix over `data`; panics unless `data.len() == rows * cols`.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "BUG: matrix of {rows}x{cols} over {} elements", data.len());
        Self { ptr: data.as_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// A strided matrix.
    ///
    /// # Safety
    /// Every element `r * stride + c` with `r < rows`, `c < cols` must be readable for `'a` and not written meanwhile.
    pub unsafe fn from_raw(ptr: *const T, rows: usize, cols: usize, stride: usize) -> Self {
        debug_assert!(stride >= cols || rows <= 1);
        Self { ptr, rows, cols, stride, life: PhantomData }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn cols(&self) -> usize {
        self.cols
    }
    /// Elements from one row's start to the next's.
    pub fn stride(&self) -> usize {
        self.stride
    }
    pub fn as_ptr(&self) -> *const T {
        self.ptr
    }

    /// Row `r`.
    #[inline(always)]
    pub fn row(&self, r: usize) -> &'a [T] {
        debug_assert!(r < self.rows, "BUG: row {r} of {}", self.rows);
        // SAFETY: `from_raw`'s contract.
        unsafe { std::slice::from_raw_parts(self.ptr.add(r * self.stride), self.cols) }
    }

    /// Rows `start..start + rows`, columns `col..col + cols`.
    pub fn block(&self, start: usize, rows: usize, col: usize, cols: usize) -> Mat<'a, T> {
        assert!(start + rows <= self.rows && col + cols <= self.cols, "BUG: block out of range");
        // SAFETY: inside `self`.
        unsafe { Mat::from_raw(self.ptr.add(start * self.stride + col), rows, cols, self.stride) }
    }

    /// The elements as one slice if rows touch each other.
    pub fn as_slice(&self) -> Option<&'a [T]> {
        // SAFETY: contiguous by the test.
        (self.stride == self.cols || self.rows <= 1)
            .then(|| unsafe { std::slice::from_raw_parts(self.ptr, self.rows * self.cols) })
    }
}

impl<'a, T> MatMut<'a, T> {
    /// A contiguous matrix over `data`; panics unless `data.len() == rows * cols`.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "BUG: matrix of {rows}x{cols} over {} elements", data.len());
        Self { ptr: data.as_mut_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// A strided matrix.
    ///
    /// # Safety
    /// Every element `r * stride + c` with `r < rows`, `c < cols` must be valid and exclusive for `'a`.
    pub unsafe fn from_raw(ptr: *mut T, rows: usize, cols: usize, stride: usize) -> Self {
        debug_assert!(stride >= cols || rows <= 1);
        Self { ptr, rows, cols, stride, life: PhantomData }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }
    pub fn cols(&self) -> usize {
        self.cols
    }
    pub fn stride(&self) -> usize {
        self.stride
    }
    pub fn as_mut_ptr(&self) -> *mut T {
        self.ptr
    }

    /// A shared view.
    pub fn as_ref(&self) -> Mat<'_, T> {
        // SAFETY: a reborrow.
        unsafe { Mat::from_raw(self.ptr, self.rows, self.cols, self.stride) }
    }

    /// Row `r`, exclusively.
    #[inline(always)]
    pub fn row_mut(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows, "BUG: row {r} of {}", self.rows);
        // SAFETY: exclusive borrow of `self`.
        unsafe { self.row_unchecked(r) }
    }

    /// Row `r` from a shared reference, for parallel loops whose tasks own disjoint rows.
    ///
    /// # Safety
    /// No two live borrows may overlap.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row_unchecked(&self, r: usize) -> &mut [T] {
        debug_assert!(r < self.rows, "BUG: row {r} of {}", self.rows);
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(r * self.stride), self.cols) }
    }

    /// Rows `start..start + rows`, columns `col..col + cols`, from a shared reference.
    ///
    /// # Safety
    /// No two live borrows may overlap.
    pub unsafe fn block_unchecked(&self, start: usize, rows: usize, col: usize, cols: usize) -> MatMut<'_, T> {
        assert!(start + rows <= self.rows && col + cols <= self.cols, "BUG: block out of range");
        // SAFETY: inside `self`; disjointness is the caller's promise.
        unsafe { MatMut::from_raw(self.ptr.add(start * self.stride + col), rows, cols, self.stride) }
    }
}
