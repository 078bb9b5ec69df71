package optim

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// option is a hyperparameter as an argument: a word and a float.
type option struct {
	word  string
	value *float32
}

// options returns what the optimizer takes, in the order of Args; nil if it is
// unknown.
func (c *Config) options() []option {
	var o []option
	switch c.Name {
	case SGD:
		o = []option{{"MOMENTUM", &c.Momentum}}
	case Adam, AdamW:
		o = []option{{"BETA1", &c.Beta1}, {"BETA2", &c.Beta2}, {"EPS", &c.Eps}}
	case RMSProp:
		o = []option{{"ALPHA", &c.Alpha}, {"EPS", &c.Eps}, {"MOMENTUM", &c.Momentum}}
	case Adagrad:
		o = []option{{"EPS", &c.Eps}}
	default:
		return nil
	}
	return append(append([]option{{"LR", &c.LR}}, o...), option{"WEIGHTDECAY", &c.WeightDecay})
}

// keyword reports whether a word begins an argument of some optimizer.
func keyword(word string) bool {
	return slices.Contains([]string{
		"LR", "MOMENTUM", "NESTEROV", "WEIGHTDECAY", "BETA1", "BETA2", "EPS", "ALPHA", "WARMUP", "SCHEDULE",
	}, strings.ToUpper(word))
}

// ParseArgs reads a Config from words in any case, as a database command has
// them, and validates it:
//
//	SGD LR lr [MOMENTUM m] [NESTEROV] [WEIGHTDECAY wd]
//	ADAM LR lr [BETA1 b] [BETA2 b] [EPS eps] [WEIGHTDECAY wd]
//	ADAMW LR lr [BETA1 b] [BETA2 b] [EPS eps] [WEIGHTDECAY wd]
//	RMSPROP LR lr [ALPHA a] [EPS eps] [MOMENTUM m] [WEIGHTDECAY wd]
//	ADAGRAD LR lr [EPS eps] [WEIGHTDECAY wd]
//
// and after each
//
//	[WARMUP steps] [SCHEDULE CONSTANT | LINEAR total cooldown [min] |
//	COSINE total [min] | STEP every gamma | EXPONENTIAL gamma]
//
// The arguments behind the optimizer may stand in any order, none twice. What
// is left out has its default. Numbers are decimal.
func ParseArgs(args []string) (Config, error) {
	if len(args) == 0 {
		return Config{}, errors.New("the optimizer is missing: use SGD, ADAM, ADAMW, RMSPROP or ADAGRAD")
	}
	c := Config{Name: strings.ToLower(args[0])}
	options := c.options()
	if options == nil {
		return Config{}, fmt.Errorf("unknown optimizer %.32q: use SGD, ADAM, ADAMW, RMSPROP or ADAGRAD", args[0])
	}
	p := parser{rest: args[1:]}
	var seen []string
	for len(p.rest) > 0 && p.err == nil {
		word := strings.ToUpper(p.rest[0])
		at := slices.IndexFunc(options, func(o option) bool { return o.word == word })
		if at < 0 && word != "WARMUP" && word != "SCHEDULE" && !(word == "NESTEROV" && c.Name == SGD) {
			if keyword(word) {
				return Config{}, fmt.Errorf("%s does not belong to %s", word, strings.ToUpper(c.Name))
			}
			return Config{}, fmt.Errorf("unknown argument %.32q of %s", p.rest[0], strings.ToUpper(c.Name))
		}
		if slices.Contains(seen, word) {
			return Config{}, fmt.Errorf("%s stands twice", word)
		}
		seen = append(seen, word)
		p.rest = p.rest[1:]
		switch {
		case word == "NESTEROV":
			c.Nesterov = true
		case word == "WARMUP":
			c.Schedule.Warmup = p.count(word)
		case word == "SCHEDULE":
			p.schedule(&c.Schedule)
		default:
			*options[at].value = p.float(word)
			// Zero would mean the default, which is not what stands there.
			if p.err == nil && *options[at].value == 0 && word != "MOMENTUM" && word != "WEIGHTDECAY" {
				return Config{}, fmt.Errorf("%s 0 is out of range: give a number above 0", word)
			}
		}
	}
	if p.err != nil {
		return Config{}, p.err
	}
	if !slices.Contains(seen, "LR") {
		return Config{}, errors.New("LR, the learning rate, is missing")
	}
	if err := c.Validate(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// Args returns the words that ParseArgs reads a valid Config from, the same to
// the bit. Zeros are left out.
func (c Config) Args() []string {
	args := []string{strings.ToUpper(c.Name)}
	for _, o := range c.options() {
		if *o.value != 0 {
			args = append(args, o.word, text(*o.value))
		}
		if o.word == "MOMENTUM" && c.Nesterov {
			args = append(args, "NESTEROV")
		}
	}
	s := c.Schedule
	if s.Warmup != 0 {
		args = append(args, "WARMUP", strconv.FormatUint(s.Warmup, 10))
	}
	if s.Name == "" {
		return args
	}
	args = append(args, "SCHEDULE", strings.ToUpper(s.Name))
	for _, n := range []uint64{s.Total, s.Cooldown, s.Every} {
		if n != 0 {
			args = append(args, strconv.FormatUint(n, 10))
		}
	}
	for _, x := range []float32{s.Min, s.Gamma} {
		if x != 0 {
			args = append(args, text(x))
		}
	}
	return args
}

// text returns the shortest decimal that is x again.
func text(x float32) string { return strconv.FormatFloat(float64(x), 'g', -1, 32) }

// parser reads numbers from the front of rest; err is the first error.
type parser struct {
	rest []string
	err  error
}

func (p *parser) schedule(s *Schedule) {
	name := p.next("SCHEDULE")
	if p.err != nil {
		return
	}
	s.Name = strings.ToLower(name)
	word := "SCHEDULE " + strings.ToUpper(s.Name)
	optional := func() float32 {
		if len(p.rest) == 0 || keyword(p.rest[0]) {
			return 0
		}
		return p.float(word + " min")
	}
	switch s.Name {
	case Constant:
	case Linear:
		s.Total, s.Cooldown = p.count(word+" total"), p.count(word+" cooldown")
		s.Min = optional()
	case Cosine:
		s.Total = p.count(word + " total")
		s.Min = optional()
	case StepDecay:
		s.Every, s.Gamma = p.count(word+" every"), p.float(word+" gamma")
	case Exponential:
		s.Gamma = p.float(word + " gamma")
	default:
		p.err = fmt.Errorf("SCHEDULE %.32q is unknown: use CONSTANT, LINEAR, COSINE, STEP or EXPONENTIAL", name)
	}
}

// next returns the next word, the value of what.
func (p *parser) next(what string) string {
	if p.err != nil {
		return ""
	}
	if len(p.rest) == 0 {
		p.err = fmt.Errorf("%s has no value", what)
		return ""
	}
	word := p.rest[0]
	p.rest = p.rest[1:]
	return word
}

func (p *parser) count(what string) uint64 {
	word := p.next(what)
	if p.err != nil {
		return 0
	}
	n, err := strconv.ParseUint(word, 10, 64)
	if err != nil || n > maxSteps {
		p.err = fmt.Errorf("%s %.32q is not a number of steps up to %d", what, word, uint64(maxSteps))
	}
	return n
}

func (p *parser) float(what string) float32 {
	word := p.next(what)
	if p.err != nil {
		return 0
	}
	x, err := strconv.ParseFloat(word, 32)
	switch {
	case strings.Trim(word, "+-.0123456789eE") != "" || err != nil && !errors.Is(err, strconv.ErrRange):
		p.err = fmt.Errorf("%s %.32q is not a decimal number", what, word)
	case err != nil:
		p.err = fmt.Errorf("%s %.32q is too large", what, word)
	case x == 0:
		if mantissa, _, _ := strings.Cut(strings.ToLower(word), "e"); strings.Trim(mantissa, "+-.0") != "" {
			p.err = fmt.Errorf("%s %.32q is too small", what, word)
		}
		return 0 // not the negative one
	}
	return float32(x)
}
