package round

import (
	"errors"
	"fmt"
	"time"
)

// Machine is one peer's state. It is not safe for concurrent use.
type Machine struct{ cfg Config }

// New checks the configuration. The machine does nothing before Start.
func New(cfg Config) (*Machine, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("round: %w", err)
	}
	return &Machine{cfg: cfg}, nil
}

func (c *Config) validate() error {
	if c.N < 1 || c.N > MaxPeers {
		return errors.New("bad roster size")
	}
	return nil
}

// Step takes one event and returns what to do about it. now is any clock that
// never goes back; the returned slice is valid until the next Step.
func (m *Machine) Step(now time.Duration, ev Event) []Action { return nil }
