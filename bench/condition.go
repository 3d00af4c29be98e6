package main

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/sluicefs/sluice/bench/frontend"
)

// condition is in which way a server is driven.
type condition struct {
	name     string
	depth    int
	queues   int
	wait     frontend.Wait
	layout   frontend.Layout
	together bool // driver and server on the same CPUs
}

var conditionForm = regexp.MustCompile(`^([psc])([1-9][0-9]{0,3})(?:x([1-9][0-9]{0,2}))?(-flat)?$`)

// parseCondition reads a condition's name: how the driver waits, how many requests are under way, on how many queues.
func parseCondition(name string) (condition, error) {
	m := conditionForm.FindStringSubmatch(name)
	if m == nil {
		return condition{}, fmt.Errorf("condition %q: expected p (polling), s (sleeping, on one CPU) or c (sleeping, across CPUs), the depth, and maybe xQUEUES and -flat: p16, s1, c1, p64x4, p16-flat", name)
	}
	c := condition{name: name, queues: 1, together: m[1] == "s"}
	if m[1] == "p" {
		c.wait = frontend.Poll
	}
	if m[4] != "" {
		c.layout = frontend.Contiguous
	}
	// The form has made sure of numbers.
	c.depth, _ = strconv.Atoi(m[2])
	if m[3] != "" {
		c.queues, _ = strconv.Atoi(m[3])
	}
	return c, nil
}

// text says what the condition is.
func (c condition) text() string {
	s := fmt.Sprintf("%d %s under way", c.depth, plural(c.depth, "request"))
	if c.queues > 1 {
		s += fmt.Sprintf(" on each of %d queues", c.queues)
	}
	switch {
	case c.together:
		s += ", the driver sleeping, driver and server on one CPU"
	case c.wait == frontend.Poll:
		s += ", the driver polling, driver and server on different CPUs"
	default:
		s += ", the driver sleeping, driver and server on different CPUs"
	}
	if c.layout == frontend.Contiguous {
		s += ", buffers in one piece"
	}
	return s
}

func plural(n int, what string) string {
	if n == 1 {
		return what
	}
	return what + "s"
}

// place chooses the CPUs of the driver and of the server: as many as there are queues, of those that each may have.
func (c condition) place(drivers, servers []int) (driver, server []int) {
	server = servers[:min(c.queues, len(servers))]
	if c.together {
		return server, server
	}
	return drivers[:min(c.queues, len(drivers))], server
}

// config is how the server at socket is driven.
func (c condition) config(socket string, cpus []int) frontend.Config {
	return frontend.Config{Socket: socket, Queues: c.queues, Depth: c.depth, Layout: c.layout, Wait: c.wait, CPUs: cpus}
}
