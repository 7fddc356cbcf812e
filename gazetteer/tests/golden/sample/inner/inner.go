// Package inner ends things.
package inner

// Done ends one.
func Done() {}
