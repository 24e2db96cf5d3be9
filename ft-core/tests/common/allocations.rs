//! Counts what a thread allocates, so that a test can hold a decoder against a bound.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes allocated by this thread since [`measure`] began, whether freed again or not.
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call goes to `System` unchanged, which keeps the contract; counting touches a
// thread-local without a destructor that is initialised by a constant, so it never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get().wrapping_add(layout.size()));
        // SAFETY: the caller keeps `GlobalAlloc::alloc`'s contract, which is `System`'s.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `System` with this layout, by `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `work`; returns its result and the bytes that it allocated.
pub(crate) fn measure<T>(work: impl FnOnce() -> T) -> (T, usize) {
    ALLOCATED.set(0);
    let result = work();
    (result, ALLOCATED.get())
}
