// Package queue holds work until someone has time.
// func notAFunction() {}
package queue

import (
	"fmt"
	"os/exec"

	"example.com/sample/inner"
	mod "github.com/pkg/errors/x"
)

// Limit of the queue.
const Limit = 10

const (
	Low = iota
	High
)

var ErrFull = mod.New("full")

// Queue is a queue.
type Queue struct {
	items []string
}

// Pusher takes items.
type Pusher interface {
	Push(item string) error
}

type ID int

// Push adds an item.
func (q *Queue) Push(item string) error {
	q.items = append(q.items, item)
	go fmt.Println("func inAString() {}")
	return nil
}

// New makes one.
func New[T any]() *Queue {
	for i := 0; i < Limit; i++ {
		defer inner.Done()
	}
	exec.Command("ls")
	return &Queue{}
}
