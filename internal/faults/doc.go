// Package faults holds no code but tests: real peers, each a process in a
// network namespace of its own, go through what real networks, machines and
// people do to them. They need Linux, root and the build tag integration;
// docs/faults.md says how to run them and what each shows.
package faults
