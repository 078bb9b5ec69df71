package sim

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/internal/round"
)

// Bounds of a scenario.
const (
	MaxScenario = 1 << 20 // bytes
	maxFaults   = 10_000
	maxTime     = time.Hour
)

// setting is one line of a scenario's head.
type setting struct {
	name   string
	format func(c *Config) string // empty: as where it is not given
	parse  func(c *Config, s string) error
}

var settings = []setting{
	number("seed", 0, 1<<64-1, func(c *Config) *uint64 { return &c.Seed }),
	number("peers", 1, round.MaxPeers, func(c *Config) *int { return &c.Peers }),
	number("faulty", 0, round.MaxPeers, func(c *Config) *int { return &c.F }),
	number("rounds", 0, 1<<20, func(c *Config) *uint64 { return &c.Rounds }),
	length("chaos", func(c *Config) *time.Duration { return &c.Chaos }),
	length("settle", func(c *Config) *time.Duration { return &c.Settle }),
	length("delay", func(c *Config) *time.Duration { return &c.Delay }),
	chance("loss", func(c *Config) *float64 { return &c.Loss }),
	chance("duplicate", func(c *Config) *float64 { return &c.Duplicate }),
	chance("failures", func(c *Config) *float64 { return &c.Failures }),
	chance("crash-writes", func(c *Config) *float64 { return &c.CrashWrites }),
	number("checkpoint-every", 0, 1<<20, func(c *Config) *uint64 { return &c.CheckpointEvery }),
	list("slow", func(c *Config) *[]int { return &c.Slow }),
	list("liars", func(c *Config) *[]int { return &c.Liars }),
	{"lies", func(c *Config) string { return c.Lies.String() }, func(c *Config, s string) (err error) {
		c.Lies, err = parseLies(s)
		return err
	}},
	word("bridge", func(c *Config) *bool { return &c.Bridge }),
	word("signed", func(c *Config) *bool { return &c.Signed }),
}

func number[T int | uint64](name string, lo, hi uint64, at func(*Config) *T) setting {
	return setting{name, func(c *Config) string {
		if *at(c) == 0 {
			return ""
		}
		return fmt.Sprint(*at(c))
	}, func(c *Config, s string) error {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil || v < lo || v > hi {
			return fmt.Errorf("%q is no number from %d to %d", s, lo, hi)
		}
		*at(c) = T(v)
		return nil
	}}
}

func length(name string, at func(*Config) *time.Duration) setting {
	return setting{name, func(c *Config) string {
		if *at(c) == 0 {
			return ""
		}
		return at(c).String()
	}, func(c *Config, s string) (err error) {
		*at(c), err = parseTime(s)
		return err
	}}
}

func chance(name string, at func(*Config) *float64) setting {
	return setting{name, func(c *Config) string {
		if *at(c) == 0 {
			return ""
		}
		return strconv.FormatFloat(*at(c), 'g', -1, 64)
	}, func(c *Config, s string) error {
		v, err := strconv.ParseFloat(s, 64)
		if err != nil || !(v >= 0 && v < 1) {
			return fmt.Errorf("%q is no chance from 0 to less than 1", s)
		}
		*at(c) = v
		return nil
	}}
}

func list(name string, at func(*Config) *[]int) setting {
	return setting{name, func(c *Config) string { return joinPeers(*at(c)) }, func(c *Config, s string) (err error) {
		*at(c), err = parsePeers(s)
		return err
	}}
}

func word(name string, at func(*Config) *bool) setting {
	return setting{name, func(c *Config) string {
		if !*at(c) {
			return ""
		}
		return "yes"
	}, func(c *Config, s string) error {
		if s != "yes" && s != "no" {
			return fmt.Errorf("%q is neither yes nor no", s)
		}
		*at(c) = s == "yes"
		return nil
	}}
}

// String lists the lies by name.
func (l Lies) String() string {
	var names []string
	for i, name := range lieNames {
		if l&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

func parseLies(s string) (l Lies, err error) {
	for name := range strings.SplitSeq(s, ",") {
		i := slices.Index(lieNames, name)
		if i < 0 {
			return 0, fmt.Errorf("there is no lie %q: take some of %s", name, strings.Join(lieNames, ","))
		}
		l |= 1 << i
	}
	return l, nil
}

func parseTime(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 || d > maxTime {
		return 0, fmt.Errorf("%q is no time from 0s to %v, such as 1.2s", s, maxTime)
	}
	return d, nil
}

func joinPeers(peers []int) string {
	s := make([]string, len(peers))
	for i, p := range peers {
		s[i] = strconv.Itoa(p)
	}
	return strings.Join(s, ",")
}

// parsePeers reads peers that are set apart by commas, each once.
func parsePeers(s string) (peers []int, err error) {
	for name := range strings.SplitSeq(s, ",") {
		p, err := strconv.ParseUint(name, 10, 10)
		if err != nil {
			return nil, fmt.Errorf("%q is no peer", name)
		}
		if slices.Contains(peers, int(p)) {
			return nil, fmt.Errorf("peer %d twice", p)
		}
		peers = append(peers, int(p))
	}
	return peers, nil
}

// String is the fault's line in a scenario.
func (f Fault) String() string {
	s := fmt.Sprintf("at %v %s", f.At, f.Kind)
	switch f.Kind {
	case PowerCut:
	case Partition, Split:
		for i, part := range f.Parts {
			if i > 0 {
				s += " |"
			}
			s += " " + joinPeers(part)
		}
	default:
		s += " " + strconv.Itoa(f.Peer)
	}
	if f.For > 0 {
		s += fmt.Sprintf(" for %v", f.For)
	}
	return s
}

// parseFault reads a fault from the words of its line.
func parseFault(words []string) (f Fault, err error) {
	if len(words) < 3 {
		return f, errors.New(`a fault reads "at 1.2s crash 3 for 400ms"`)
	}
	if f.At, err = parseTime(words[1]); err != nil {
		return f, err
	}
	f.Kind, words = FaultKind(words[2]), words[3:]
	if n := len(words); n >= 2 && words[n-2] == "for" {
		if f.For, err = parseTime(words[n-1]); err != nil {
			return f, err
		}
		if f.For == 0 {
			return f, fmt.Errorf("a %s for no time", f.Kind)
		}
		words = words[:n-2]
	}
	lasts := true
	switch f.Kind {
	case PowerCut:
		if len(words) > 0 {
			return f, errors.New("a power-cut is of all peers")
		}
	case Partition, Split:
		var seen []int
		for part := range strings.SplitSeq(strings.Join(words, " "), " | ") {
			p, err := parsePeers(part)
			if err != nil {
				return f, err
			}
			for _, q := range p {
				if slices.Contains(seen, q) {
					return f, fmt.Errorf("peer %d is on two sides", q)
				}
			}
			seen = append(seen, p...)
			f.Parts = append(f.Parts, p)
		}
		if len(f.Parts) < 2 {
			return f, fmt.Errorf(`a %s has sides: "0,1 | 2,3"`, f.Kind)
		}
	case Start, Join, Leave:
		lasts = false
		fallthrough
	case Crash, FullDisk, Pause:
		p, err := parsePeers(strings.Join(words, " "))
		if err != nil || len(p) != 1 {
			return f, fmt.Errorf("a %s is of one peer, not of %q", f.Kind, strings.Join(words, " "))
		}
		f.Peer = p[0]
	default:
		return f, fmt.Errorf("there is no fault %q", f.Kind)
	}
	switch {
	case !lasts && f.For > 0:
		return f, fmt.Errorf("a %s does not last", f.Kind)
	case lasts && f.For == 0 && f.Kind != Crash:
		return f, fmt.Errorf(`a %s needs a time: "for 400ms"`, f.Kind)
	}
	return f, nil
}

// Format writes a run as a scenario, under comments.
func Format(c Config, comments ...string) []byte {
	c = c.Explicit()
	var b bytes.Buffer
	for _, text := range comments {
		for line := range strings.SplitSeq(text, "\n") {
			fmt.Fprintln(&b, strings.TrimSpace("# "+line))
		}
	}
	for _, s := range settings {
		if v := s.format(&c); v != "" {
			fmt.Fprintln(&b, s.name, v)
		}
	}
	for _, f := range c.Faults {
		fmt.Fprintln(&b, f)
	}
	return b.Bytes()
}

// Parse reads a scenario: a setting or a fault a line, comments after #. The
// error names the line.
func Parse(text []byte) (Config, error) {
	c := Config{Faults: []Fault{}}
	if len(text) > MaxScenario {
		return c, fmt.Errorf("the scenario is longer than %d bytes", MaxScenario)
	}
	seen := map[string]bool{}
	number := 0
	for line := range strings.SplitSeq(string(text), "\n") {
		number++
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		if err := c.parseLine(words, seen); err != nil {
			return c, fmt.Errorf("line %d: %w", number, err)
		}
	}
	if err := c.validate(); err != nil {
		return c, err
	}
	return c, nil
}

func (c *Config) parseLine(words []string, seen map[string]bool) error {
	if words[0] == "at" {
		f, err := parseFault(words)
		if err == nil && len(c.Faults) == maxFaults {
			err = fmt.Errorf("more than %d faults", maxFaults)
		}
		c.Faults = append(c.Faults, f)
		return err
	}
	i := slices.IndexFunc(settings, func(s setting) bool { return s.name == words[0] })
	switch {
	case i < 0:
		return fmt.Errorf("there is no setting %q", words[0])
	case seen[words[0]]:
		return fmt.Errorf("%s is given twice", words[0])
	case len(words) != 2:
		return fmt.Errorf("%s takes one value", words[0])
	}
	seen[words[0]] = true
	if err := settings[i].parse(c, words[1]); err != nil {
		return fmt.Errorf("%s: %w", words[0], err)
	}
	return nil
}

// startsAsMember reports whether p is on the first roster: unless it joins
// before it leaves.
func (c *Config) startsAsMember(p int) bool {
	i := slices.IndexFunc(c.Faults, func(f Fault) bool { return f.Peer == p && (f.Kind == Join || f.Kind == Leave) })
	return i < 0 || c.Faults[i].Kind == Leave
}

// validate checks what no line shows by itself.
func (c *Config) validate() error {
	if c.Peers == 0 {
		return errors.New("the scenario does not say how many peers there are")
	}
	if c.F > round.MaxFaulty(c.Peers) {
		return fmt.Errorf("%d peers stand at most %d faulty ones, not %d", c.Peers, round.MaxFaulty(c.Peers), c.F)
	}
	if c.Delay > 0 && c.Delay < time.Millisecond {
		return fmt.Errorf("a delay of %v is less than 1ms", c.Delay)
	}
	if c.Lies != 0 && len(c.Liars) == 0 {
		return errors.New("there are lies, but no liars")
	}
	member := func(p int) error {
		if p >= c.Peers {
			return fmt.Errorf("there is no peer %d: peers count from 0", p)
		}
		return nil
	}
	for _, p := range slices.Concat(c.Slow, c.Liars) {
		if err := member(p); err != nil {
			return err
		}
	}
	members := map[int]bool{}
	for p := range c.Peers {
		members[p] = c.startsAsMember(p)
	}
	count := c.Peers
	for _, member := range members {
		if !member {
			count--
		}
	}
	if count == 0 {
		return errors.New("there is no member at the start")
	}
	for i, f := range c.Faults {
		err := member(f.Peer)
		sides := 0
		for _, part := range f.Parts {
			for _, p := range part {
				err = errors.Join(err, member(p))
			}
			sides += len(part)
		}
		if len(f.Parts) > 0 && sides != c.Peers {
			err = errors.Join(err, fmt.Errorf("%d peers on all sides together, not %d", sides, c.Peers))
		}
		if f.Kind != Start && f.At > c.Chaos {
			err = errors.Join(err, fmt.Errorf("it comes after the end of chaos, %v", c.Chaos))
		}
		if f.Kind == Join || f.Kind == Leave {
			if members[f.Peer] == (f.Kind == Join) {
				err = errors.Join(err, fmt.Errorf("peer %d has done that before", f.Peer))
			}
			members[f.Peer] = f.Kind == Join
			if count--; f.Kind == Join {
				count += 2
			}
			if count == 0 {
				err = errors.Join(err, errors.New("nobody is left"))
			}
		}
		if i > 0 && c.Faults[i-1].At > f.At {
			err = errors.Join(err, errors.New("faults go by ascending time"))
		}
		if err != nil {
			return fmt.Errorf("%v: %w", f, err)
		}
	}
	return nil
}
