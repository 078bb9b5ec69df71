package spirt

import (
	"errors"
	"io/fs"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"
)

func TestDefaultJob(t *testing.T) {
	want := Job{
		Peers: 4, Byzantine: 1, Model: "lenet5", Data: "mnist-10k", Optimizer: "adam", LearningRate: 0.002,
		BatchSize: 64, BatchesPerRound: 1, Rounds: 400, Cooldown: 200, ValidateEvery: 25, Shards: "epoch", Codec: "float32", Seed: 1, CheckpointEvery: 50,
		Functions: Functions{Concurrency: 2, MemoryMB: 256, Timeout: time.Minute},
	}
	if got := DefaultJob(); got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	again := want
	check(t, again.Resolve())
	if again != want {
		t.Errorf("resolving a resolved job made %+v of it", again)
	}
	if _, _, err := want.open(); err != nil {
		t.Error(err)
	}
}

func TestByzantineByPeers(t *testing.T) {
	for peers, want := range map[int]int{1: 0, 2: 0, 3: 0, 4: 1, 6: 1, 7: 2, 64: 21} {
		j := Job{Peers: peers}
		check(t, j.Resolve())
		if j.Byzantine != want {
			t.Errorf("%d peers withstand %d liars, want %d", peers, j.Byzantine, want)
		}
	}
}

// The models of every so manieth round are validated, each is announced once,
// before the next is begun and before the run ends.
func TestValidates(t *testing.T) {
	for every := 1; every < 30; every++ {
		for rounds := 1; rounds < 70; rounds++ {
			j := Job{ValidateEvery: every, Rounds: rounds}
			var got, want []uint64
			for model := every; model < rounds; model += every {
				want = append(want, uint64(model))
			}
			for height := range uint64(rounds + 10) {
				model := j.validated(height)
				if model == 0 {
					continue
				}
				got = append(got, model)
				if at, ok := j.validates(model); !ok || at != height || height <= model || height > model+validationLag || height > model+uint64(every) || height > uint64(rounds) {
					t.Fatalf("every %d of %d: the model of %d is announced at %d, and at %d", every, rounds, model, height, at)
				}
			}
			if !slices.Equal(got, want) {
				t.Fatalf("every %d of %d: validated %v, want %v", every, rounds, got, want)
			}
		}
	}
}

// Each error names the field and what would do.
func TestResolveRefuses(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		set  func(j *Job)
		says []string
	}{
		{func(j *Job) { j.Peers = -1 }, []string{"peers: -1", "1 to 64"}},
		{func(j *Job) { j.Peers = 65 }, []string{"peers: 65", "1 to 64"}},
		{func(j *Job) { j.Byzantine = -1 }, []string{"byzantine", "-1", "at most 1"}},
		{func(j *Job) { j.Byzantine = 2 }, []string{"byzantine", "4 peers", "2 liars", "at most 1"}},
		{func(j *Job) { j.Model = "lenet6" }, []string{"model", "lenet6", "lenet5"}},
		{func(j *Job) { j.Data = "idx:a\x1b[2J" }, []string{"data: ", "control character"}},
		{func(j *Job) { j.Optimizer = "adagrad" }, []string{"optimizer", "adagrad", "sgd or adam"}},
		{func(j *Job) { j.LearningRate = -1 }, []string{"lr: -1", "positive"}},
		{func(j *Job) { j.LearningRate = float32(nan) }, []string{"lr: NaN", "positive"}},
		{func(j *Job) { j.LearningRate = float32(math.Inf(1)) }, []string{"lr: +Inf", "positive"}},
		{func(j *Job) { j.BatchSize = -1 }, []string{"batch_size: -1", "1 to 4096"}},
		{func(j *Job) { j.BatchSize = 4097 }, []string{"batch_size: 4097", "1 to 4096"}},
		{func(j *Job) { j.BatchesPerRound = -1 }, []string{"batches_per_round: -1", "1 to 65536"}},
		{func(j *Job) { j.BatchesPerRound = 65537 }, []string{"batches_per_round: 65537", "1 to 65536"}},
		{func(j *Job) { j.Rounds = -1 }, []string{"rounds: -1", "1 to 2147483647"}},
		{func(j *Job) { j.Cooldown = -2 }, []string{"cooldown: -2", "400", "-1 for none"}},
		{func(j *Job) { j.Cooldown = 401 }, []string{"cooldown: 401", "400", "-1 for none"}},
		{func(j *Job) { j.Shards = "random" }, []string{"shards", "random", "epoch or fixed"}},
		{func(j *Job) { j.Codec = "float64" }, []string{"codec", "float64", "float32 or float16"}},
		{func(j *Job) { j.TargetAccuracy = -0.1 }, []string{"target_accuracy: -0.1", "0 to 1", "0.97"}},
		{func(j *Job) { j.TargetAccuracy = 97 }, []string{"target_accuracy: 97", "0 to 1", "0.97"}},
		{func(j *Job) { j.TargetAccuracy = nan }, []string{"target_accuracy: NaN", "0 to 1"}},
		{func(j *Job) { j.ValidateEvery = -1 }, []string{"validate_every: -1", "1 or more"}},
		{func(j *Job) { j.CheckpointEvery = -1 }, []string{"checkpoint_every: -1", "1 to 1048576"}},
		{func(j *Job) { j.PauseAfter = 149 }, []string{"pause_after: 149", "at least three checkpoints, 150 rounds"}},
		{func(j *Job) { j.Functions.Kind = "elsewhere" }, []string{"functions.kind: \"elsewhere\"", "processes or database"}},
		{func(j *Job) { j.Functions.Concurrency = -1 }, []string{"functions.concurrency: -1", "1 to 1024"}},
		{func(j *Job) { j.Functions.Concurrency = 1025 }, []string{"functions.concurrency: 1025", "1 to 1024"}},
		{func(j *Job) { j.Functions.MemoryMB = 31 }, []string{"functions.memory_mb: 31", "32 to 10240"}},
		{func(j *Job) { j.Functions.MemoryMB = 10241 }, []string{"functions.memory_mb: 10241", "32 to 10240"}},
		{func(j *Job) { j.Functions.Timeout = time.Second - 1 }, []string{"functions.timeout: 999.999999ms", "1s to 15m"}},
		{func(j *Job) { j.Functions.Timeout = 15*time.Minute + 1 }, []string{"functions.timeout: 15m0.000000001s", "1s to 15m"}},
	} {
		j := DefaultJob()
		c.set(&j)
		refused(t, j.Resolve(), c.says...)
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, c := range []struct {
		set  func(j *Job)
		says []string
	}{
		{func(j *Job) { j.Data = "mnist-20k" }, []string{"data", "mnist-20k", "mnist-10k"}},
		{func(j *Job) { j.Data = "idx:" + filepath.Join(t.TempDir(), "none") }, []string{"data", "none"}},
		{func(j *Job) { j.BatchSize = 2000 }, []string{"batch_size", "1750", "2000", "fewer peers or a smaller batch"}},
	} {
		j := DefaultJob()
		c.set(&j)
		check(t, j.Resolve())
		_, _, err := j.open()
		refused(t, err, c.says...)
	}
}

func TestLoadJob(t *testing.T) {
	j, err := LoadJob(writeTemp(t, "job.yaml", "# a comment\npeers: 7\nlr: 0.1\nfunctions:\n  timeout: 2m\n"))
	check(t, err)
	want := DefaultJob()
	want.Peers, want.Byzantine, want.LearningRate, want.Functions.Timeout = 7, 2, 0.1, 2*time.Minute
	if j != want {
		t.Errorf("got  %+v\nwant %+v", j, want)
	}
	if j, err = LoadJob(writeTemp(t, "job.yaml", "# nothing\n---\nrounds: 1e3\nlr: 0.5\n")); err != nil || j.Rounds != 1000 || j.LearningRate != 0.5 {
		t.Errorf("%+v, %v", j, err)
	}
	if j, err = LoadJob(writeTemp(t, "job.yaml", "")); err != nil || j != DefaultJob() {
		t.Errorf("an empty file: %+v, %v", j, err)
	}
}

func TestLoadJobRefuses(t *testing.T) {
	if _, err := LoadJob(filepath.Join(t.TempDir(), "job.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for text, says := range map[string][]string{
		"peers: 4\npears: 5\n":            {"job.yaml:2:1: ", `"pears"`},
		"functions:\n  memory: 1\n":       {"job.yaml:2:3: ", `"functions.memory"`},
		"rounds: 3\npeers: many\n":        {"job.yaml:2:8: ", "many"},
		"peers: 4.5\n":                    {"job.yaml:1:8: ", "peers: 4.5 is not a whole number"},
		"a: 1\n---\npeers: 5\n":           {"job.yaml"},
		"peers: 4\n---\npeers: 5\n":       {"second YAML document"},
		"functions:\n  memory_mb: 0.5\n":  {"job.yaml:2:14: ", "memory_mb: 0.5 is not a whole number"},
		"peers: 4\npeers: 5\n":            {"job.yaml:2:1: ", "peers"},
		"functions:\n  timeout: long\n":   {"long"},
		"seed: -1\n":                      {"job.yaml:1:7: "},
		"rounds: 99999999999999999999\n":  {"job.yaml:1:9: "},
		"lr: .nan\n":                      {"lr: NaN"},
		"peers: 0x50\n":                   {"peers: 80", "1 to 64"},
		"- peers\n":                       {"job.yaml:1:1: "},
		"peers: [\n":                      {"job.yaml:1:8: "},
		strings.Repeat("#", maxJobText+1): {"more than the 65536 bytes"},
		"model: &a [*a]\n":                {"job.yaml"},
	} {
		path := writeTemp(t, "job.yaml", text)
		_, err := LoadJob(path)
		if err == nil {
			t.Errorf("accepted: %.60q", text)
			continue
		}
		refused(t, err, append(says, path)...)
	}
}

func TestWriteJob(t *testing.T) {
	path := filepath.Join(t.TempDir(), "job.yaml")
	want := DefaultJob()
	want.TargetAccuracy, want.LearningRate, want.Seed, want.Data = 1.0/3, 1e-7, math.MaxUint64, "idx:a b: #c"
	check(t, writeYAML(path, "A comment.", want, 0o644))
	got, err := LoadJob(path)
	check(t, err)
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// Nothing panics, and what is accepted is written as a job that is equal.
func FuzzLoadJob(f *testing.F) {
	b, err := yaml.Marshal(DefaultJob())
	check(f, err)
	f.Add(b)
	f.Add([]byte("peers: 7\nlr: 1e-3\nfunctions: {timeout: 2m}\n"))
	f.Add([]byte("target_accuracy: .5\nseed: 18446744073709551615\ndata: 'idx:~'\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("data: |-\n  x\n  y\n"))
	f.Add([]byte("data: \"\\x00\\uFEFF\"\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 4096 {
			return
		}
		j, err := parseJob(b)
		if err != nil {
			return
		}
		text, err := yaml.Marshal(j)
		check(t, err)
		again, err := parseJob(text)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if again != j {
			t.Errorf("got  %+v\nwant %+v\n%s", again, j, text)
		}
	})
}

func TestCooldown(t *testing.T) {
	j := Job{Rounds: 10, Cooldown: 4, LearningRate: 0.5}
	check(t, j.Resolve())
	for round, want := range map[uint64]float32{1: 0.5, 6: 0.5, 7: 0.4, 8: 0.3, 9: 0.2, 10: 0.1} {
		if got := j.optimizerAt(round).LR; got != want {
			t.Errorf("round %d: learning rate %v, want %v", round, got, want)
		}
	}
	j.Cooldown = -1
	check(t, j.Resolve())
	if got := j.optimizerAt(10).LR; got != 0.5 {
		t.Errorf("without a cooldown the last learning rate is %v", got)
	}
}
