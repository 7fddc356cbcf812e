//! A small ledger.
//! struct NotAStruct;
mod account;

use std::collections::{BTreeMap, HashMap as Map};
use crate::account::Account;
use serde::Serialize;
// use nothing::at_all;

/// Most entries.
pub const LIMIT: usize = 8;

/// Holds accounts.
#[derive(Debug, Clone)]
pub struct Ledger<T> {
    accounts: Map<String, T>,
}

pub enum Entry {
    Debit(u64),
    Credit,
}

/// Anything with a balance.
pub trait Balance: Send {
    fn balance(&self) -> i64;
    fn is_empty(&self) -> bool {
        self.balance() == 0
    }
}

impl Balance for Ledger<Account> {
    fn balance(&self) -> i64 {
        let text = "fn not_a_function() {}";
        text.len() as i64 - LIMIT as i64
    }
}

impl<T> Ledger<T> {
    /// Makes an empty one.
    pub fn new() -> Self {
        let _tree: BTreeMap<u8, u8> = BTreeMap::new();
        Self { accounts: Map::new() }
    }
}

macro_rules! entry {
    () => {};
}

pub async fn fetch<S: Serialize>(_s: S) {
    std::thread::sleep(std::time::Duration::from_secs(1));
    unsafe { core::hint::unreachable_unchecked() }
}

mod tests {
    fn inner() {}
}
