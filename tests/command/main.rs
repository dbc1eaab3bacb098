//! The command as a user meets it: bad input of every kind, runs that stop and go on, runs that are killed, executables.

mod bad_input;
mod contexts;
mod devices;
mod executables;
mod pages;
mod pictures;
mod runs;
mod support;
