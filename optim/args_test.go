package optim

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseArgs(t *testing.T) {
	for text, want := range map[string]Config{
		"SGD LR 0.1": {Name: SGD, LR: 0.1},
		"sgd lr .1 momentum 0.9 nesterov weightdecay 1e-4": {Name: SGD, LR: 0.1, Momentum: 0.9, Nesterov: true, WeightDecay: 1e-4},
		"Sgd WeightDecay 0 Nesterov Momentum 0.9 lr 1":     {Name: SGD, LR: 1, Momentum: 0.9, Nesterov: true},
		"SGD LR 1 MOMENTUM -0":                             {Name: SGD, LR: 1},
		"ADAM LR 0.01 BETA1 0.8 BETA2 0.99 EPS 1e-6 WEIGHTDECAY 0.1": {
			Name: Adam, LR: 0.01, Beta1: 0.8, Beta2: 0.99, Eps: 1e-6, WeightDecay: 0.1,
		},
		"ADAMW LR 0.01 WEIGHTDECAY 0.1":               {Name: AdamW, LR: 0.01, WeightDecay: 0.1},
		"RMSPROP LR 0.01 ALPHA 0.9 EPS 1 MOMENTUM .5": {Name: RMSProp, LR: 0.01, Alpha: 0.9, Eps: 1, Momentum: 0.5},
		"ADAGRAD LR 0.01 EPS 1e-7":                    {Name: Adagrad, LR: 0.01, Eps: 1e-7},
		"SGD LR 1 WARMUP 10":                          {Name: SGD, LR: 1, Schedule: Schedule{Warmup: 10}},
		"SGD LR 1 SCHEDULE CONSTANT":                  {Name: SGD, LR: 1, Schedule: Schedule{Name: Constant}},
		"SGD LR 1 SCHEDULE LINEAR 100 40":             {Name: SGD, LR: 1, Schedule: Schedule{Name: Linear, Total: 100, Cooldown: 40}},
		"SGD LR 1 WARMUP 9 SCHEDULE LINEAR 100 40 0.1": {
			Name: SGD, LR: 1, Schedule: Schedule{Name: Linear, Warmup: 9, Total: 100, Cooldown: 40, Min: 0.1},
		},
		"SGD schedule cosine 100 warmup 5 LR 1": {Name: SGD, LR: 1, Schedule: Schedule{Name: Cosine, Warmup: 5, Total: 100}},
		"SGD LR 1 SCHEDULE COSINE 100 .01":      {Name: SGD, LR: 1, Schedule: Schedule{Name: Cosine, Total: 100, Min: 0.01}},
		"SGD LR 1 SCHEDULE STEP 30 0.1":         {Name: SGD, LR: 1, Schedule: Schedule{Name: StepDecay, Every: 30, Gamma: 0.1}},
		"SGD LR 1 SCHEDULE EXPONENTIAL 0.99":    {Name: SGD, LR: 1, Schedule: Schedule{Name: Exponential, Gamma: 0.99}},
	} {
		got, err := ParseArgs(strings.Fields(text))
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", text, got, err, want)
			continue
		}
		if again, err := ParseArgs(got.Args()); err != nil || again != want {
			t.Errorf("%s becomes %q: %v", text, got.Args(), err)
		}
	}
}

func TestParseArgsErrors(t *testing.T) {
	for text, want := range map[string]string{
		"":                                    "optimizer is missing",
		"LION LR 1":                           `unknown optimizer "LION"`,
		"SGD":                                 "LR, the learning rate, is missing",
		"SGD MOMENTUM 0.9":                    "LR, the learning rate, is missing",
		"SGD LR":                              "LR has no value",
		"SGD LR x":                            `LR "x" is not a decimal number`,
		"SGD LR NaN":                          `LR "NaN" is not a decimal number`,
		"SGD LR inf":                          `LR "inf" is not a decimal number`,
		"SGD LR -Infinity":                    `LR "-Infinity" is not`,
		"SGD LR 0x1p-3":                       `LR "0x1p-3" is not`,
		"SGD LR 1_0":                          `LR "1_0" is not`,
		"SGD LR 1e39":                         `LR "1e39" is too large`,
		"SGD LR 1e-60":                        `LR "1e-60" is too small`,
		"SGD LR 0":                            "LR 0 is out of range",
		"SGD LR -1":                           "learning rate -1",
		"SGD LR 1 LR 1":                       "LR stands twice",
		"SGD LR 1 NESTEROV nesterov":          "NESTEROV stands twice",
		"SGD LR 1 NESTEROV":                   "nesterov needs sgd with a momentum",
		"SGD LR 1 MOMENTUM 1":                 "momentum 1 is not in [0, 1)",
		"SGD LR 1 WEIGHTDECAY -1":             "weight decay -1",
		"SGD LR 1 BETA1 0.9":                  "BETA1 does not belong to SGD",
		"SGD LR 1 BETA3 0.9":                  `unknown argument "BETA3" of SGD`,
		"SGD LR 1 2":                          `unknown argument "2" of SGD`,
		"ADAM LR 1 BETA1 0":                   "BETA1 0 is out of range",
		"ADAM LR 1 BETA1 2":                   "beta1 2",
		"ADAM LR 1 NESTEROV":                  "NESTEROV does not belong to ADAM",
		"ADAMW LR 1 MOMENTUM 1":               "MOMENTUM does not belong to ADAMW",
		"RMSPROP LR 1 ALPHA 1":                "alpha 1",
		"ADAGRAD LR 1 ALPHA 1":                "ALPHA does not belong to ADAGRAD",
		"SGD LR 1 WARMUP":                     "WARMUP has no value",
		"SGD LR 1 WARMUP -1":                  `WARMUP "-1" is not a number of steps`,
		"SGD LR 1 WARMUP 99999999999999999":   `WARMUP "99999999999999999" is not`,
		"SGD LR 1 WARMUP 1 WARMUP 1":          "WARMUP stands twice",
		"SGD LR 1 SCHEDULE":                   "SCHEDULE has no value",
		"SGD LR 1 SCHEDULE POLY":              `SCHEDULE "POLY" is unknown`,
		"SGD LR 1 SCHEDULE LINEAR":            "SCHEDULE LINEAR total has no value",
		"SGD LR 1 SCHEDULE LINEAR 10":         "SCHEDULE LINEAR cooldown has no value",
		"SGD LR 1 SCHEDULE LINEAR 10 x":       `SCHEDULE LINEAR cooldown "x"`,
		"SGD LR 1 SCHEDULE LINEAR 10 11":      "schedule: warmup 0 and cooldown 11 are more",
		"SGD LR 1 SCHEDULE COSINE 10 NaN":     `SCHEDULE COSINE min "NaN"`,
		"SGD LR 1 SCHEDULE COSINE 10 0.1 0.2": `unknown argument "0.2"`,
		"SGD LR 1 SCHEDULE STEP 10":           "SCHEDULE STEP gamma has no value",
		"SGD LR 1 SCHEDULE EXPONENTIAL 1.1":   "schedule: gamma 1.1",
		"SGD LR 1 SCHEDULE STEP 1 1 SCHEDULE": "SCHEDULE stands twice",
	} {
		if c, err := ParseArgs(strings.Fields(text)); err == nil || !strings.Contains(err.Error(), want) || c != (Config{}) {
			t.Errorf("%s: %+v, %v, want %q", text, c, err, want)
		}
	}
}

// TestArgsAreExact: every valid float comes back.
func TestArgsAreExact(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 2000 {
		c := configs[rng.IntN(len(configs))]
		c.Schedule = Schedule{Name: Cosine, Warmup: rng.Uint64N(100), Total: 100 + rng.Uint64N(1<<50), Min: rng.Float32()}
		for _, o := range c.options() {
			*o.value = 1 - rng.Float32()
			if *o.value == 1 {
				*o.value = 1e-45
			}
		}
		if got, err := ParseArgs(c.Args()); err != nil || got != c {
			t.Fatalf("%+v becomes %q, then %+v: %v", c, c.Args(), got, err)
		}
	}
}

func FuzzParseArgs(f *testing.F) {
	for _, text := range []string{
		"SGD LR 0.1 MOMENTUM 0.9 NESTEROV WEIGHTDECAY 1e-4",
		"adam lr 1e-3 beta1 .9 beta2 .999 eps 1e-8 schedule step 3 0.5",
		"ADAMW LR 3e-38 WEIGHTDECAY 0.01 WARMUP 10 SCHEDULE LINEAR 100 20 0.1",
		"RMSPROP LR 1 ALPHA 0.9 EPS 1e-45 MOMENTUM 0.5 SCHEDULE COSINE 9007199254740992",
		"ADAGRAD LR +0.1E1 SCHEDULE EXPONENTIAL 1 WARMUP 00",
		"SGD LR 1 SCHEDULE CONSTANT",
		"SGD LR NaN", "SGD LR 1 MOMENTUM -0",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := ParseArgs(strings.Split(text, " "))
		if err != nil {
			if c != (Config{}) || len(err.Error()) > 300 {
				t.Fatalf("%+v: %v", c, err)
			}
			return
		}
		if err := c.Validate(); err != nil {
			t.Fatal(err)
		}
		again, err := ParseArgs(c.Args())
		if err != nil || again != c || !slices.Equal(again.Args(), c.Args()) {
			t.Fatalf("%+v becomes %q, then %+v: %v", c, c.Args(), again, err)
		}
		p := make([]float32, 9)
		s := make([]float32, c.StateLen(9))
		c.Step(p, s, p, s, make([]float32, 9), 1)
		for _, x := range p {
			if c.WeightDecay == 0 && x != 0 {
				t.Fatalf("%+v: no gradient moves a parameter to %v", c, x)
			}
		}
	})
}
