//! The command as a user meets it: bad input of every kind, runs that stop and go on, runs that are killed.

mod bad_input;
mod contexts;
mod runs;
mod support;
