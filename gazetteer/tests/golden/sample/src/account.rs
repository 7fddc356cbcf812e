//! Accounts.

/// One account.
pub struct Account {
    pub id: u64,
}
