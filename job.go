package spirt

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/goccy/go-yaml"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/function/gradient"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/optim"
)

// Job says what is trained, on what, by how many peers and for how long. The
// zero value of a field means its default, which Resolve fills in; a resolved
// job stands in the run folder as job.yaml.
type Job struct {
	// Peers is the number of peers on the roster, 1 to 64. Default 4.
	Peers int `yaml:"peers"`
	// Byzantine is the number of lying peers to withstand. Default
	// (Peers-1)/3; at most that.
	Byzantine int `yaml:"byzantine"`
	// Model is the name of a built-in model. Default "lenet5".
	Model string `yaml:"model"`
	// Data is a data set: "mnist-10k" (the default), or "idx:FOLDER".
	Data string `yaml:"data"`
	// Optimizer is "adam" (the default) or "sgd" (with momentum 0.9).
	Optimizer string `yaml:"optimizer"`
	// LearningRate is the optimizer's step size. Default 0.002.
	LearningRate float32 `yaml:"lr"`
	// BatchSize is the number of samples in a minibatch. Default 64.
	BatchSize int `yaml:"batch_size"`
	// BatchesPerRound is how many minibatches each peer averages in a round.
	// Default 1.
	BatchesPerRound int `yaml:"batches_per_round"`
	// Rounds is the number of rounds to train. Default 400.
	Rounds int `yaml:"rounds"`
	// Cooldown is the number of rounds at the end over which the learning rate
	// falls to zero in equal steps; before them it is constant. It makes an
	// end of the noise that a constant rate leaves in the parameters. Default
	// half of Rounds; -1 for none.
	Cooldown int `yaml:"cooldown"`
	// TargetAccuracy stops the run when the validation accuracy, a fraction
	// from 0 to 1, reaches it. Zero, the default, means that it does not.
	TargetAccuracy float64 `yaml:"target_accuracy"`
	// ValidateEvery is the number of rounds from one validation to the next.
	// The peers agree on its result up to 8 rounds later. Default 25.
	ValidateEvery int `yaml:"validate_every"`
	// Shards says which training samples a peer computes on. "epoch", the
	// default: every epoch is shuffled as a whole and dealt out to all peers
	// anew, so that all samples stay in use when a peer is gone. "fixed": each
	// peer keeps one part, as with private data; with the peer goes its part.
	// The parts are as the peers' minibatches a round, and are cut anew where a
	// roster changes those. Peers with data of their own have no part in either.
	Shards string `yaml:"shards"`
	// Codec is how averages travel between the peers: "float32" (the default)
	// as they are, or "float16" rounded to half the bytes. All peers train on
	// what has travelled.
	Codec string `yaml:"codec"`
	// Seed fixes the initial parameters and the order of the data. Default 1.
	Seed uint64 `yaml:"seed"`
	// Functions bounds each peer's function instances.
	Functions Functions `yaml:"functions"`
	// CheckpointEvery is the number of rounds between two checkpoints: a peer's
	// state goes to disk, and the peers vote on what is final. Default 50.
	CheckpointEvery int `yaml:"checkpoint_every"`
	// Speed is how many minibatches a second the machine computed that made
	// the job: who joins measures its own, and takes a share that fits. 0, the
	// default: all take the same.
	Speed float64 `yaml:"speed,omitempty"`
	// Patience ends the run when so many validations in a row brought no
	// improvement. 0, the default: it does not.
	Patience int `yaml:"patience,omitempty" json:",omitempty"`
	// MinDelta is by how much a validation's loss must be lower than the best
	// before it to count as an improvement. Default 0: by any.
	MinDelta float64 `yaml:"min_delta,omitempty" json:",omitempty"`
	// MaxTime ends the run when it has gone on for so long, interruptions not
	// counted: at the record at which enough peers say so. 0: no limit.
	MaxTime time.Duration `yaml:"max_time,omitempty" json:",omitempty"`
	// BudgetUSD ends the run before it has cost more than so many US dollars by
	// the run's prices, as well as the peers know from each other. 0: no limit.
	BudgetUSD float64 `yaml:"budget_usd,omitempty" json:",omitempty"`
	// PauseAfter stops a peer that is connected to less than a quorum so many
	// rounds after the last final checkpoint. 0: it trains on, tentative.
	PauseAfter int `yaml:"pause_after,omitempty"`
}

// Functions bounds the function instances of one peer.
type Functions struct {
	// Kind is "processes" (the default): instances on this machine compute
	// gradients; or "database": the peer's database does, and there are no
	// functions. Concurrency bounds both, the other fields processes only.
	Kind string `yaml:"kind,omitempty" json:",omitempty"`
	// Concurrency is the most instances at once. Default: 2, and no more than
	// there are minibatches in a round, but 2 where validations run beside
	// them.
	Concurrency int `yaml:"concurrency"`
	// MemoryMB is the memory of an instance in MiB, by which it is billed;
	// one that takes twice as much is killed. Default 256.
	MemoryMB int `yaml:"memory_mb"`
	// Timeout ends an invocation. Default one minute.
	Timeout time.Duration `yaml:"timeout"`
}

// DefaultJob returns the job that `spirt train` runs when told nothing else.
func DefaultJob() Job {
	var j Job
	if err := j.Resolve(); err != nil {
		panic("spirt: the default job is not valid: " + err.Error())
	}
	return j
}

// The values of Job.Shards.
const (
	shardsEpoch = "epoch"
	shardsFixed = "fixed"
)

// The values of Job.Codec.
const (
	codecFloat32 = "float32"
	codecFloat16 = "float16"
)

// The values of Functions.Kind.
const (
	functionsProcesses = "processes"
	functionsDatabase  = "database"
)

// Limits of a job.
const (
	maxPeers           = 64
	maxBatchSize       = gradient.MaxRows
	maxBatchesPerRound = 1 << 16
	maxRounds          = 1<<31 - 1 // an int has 32 bits on some systems
)

// Resolve fills in the defaults and checks every field. The error names the
// field, what is wrong and what would do.
func (j *Job) Resolve() error {
	orInt(&j.Peers, 4)
	if j.Peers < 1 || j.Peers > maxPeers {
		return fmt.Errorf("peers: %d is out of range: take 1 to %d", j.Peers, maxPeers)
	}
	orInt(&j.Byzantine, (j.Peers-1)/3)
	if j.Byzantine < 0 || j.Byzantine > (j.Peers-1)/3 {
		return fmt.Errorf("byzantine: %d peers cannot withstand %d liars: at most %d", j.Peers, j.Byzantine, (j.Peers-1)/3)
	}
	orString(&j.Model, "lenet5")
	if _, err := nn.Builtin(j.Model); err != nil {
		return fmt.Errorf("model: %w", err)
	}
	orString(&j.Data, "mnist-10k")
	if !utf8.ValidString(j.Data) || strings.ContainsFunc(j.Data, func(r rune) bool { return unicode.IsControl(r) || r == utf8.RuneError }) {
		return fmt.Errorf("data: %.64q has a control character or is not UTF-8: give the folder another name", j.Data)
	}
	orString(&j.Optimizer, "adam")
	if j.Optimizer != optim.SGD && j.Optimizer != optim.Adam {
		return fmt.Errorf("optimizer: %.32q is unknown: take sgd or adam", j.Optimizer)
	}
	if j.LearningRate == 0 {
		j.LearningRate = 0.002
	}
	if lr := float64(j.LearningRate); !(lr > 0) || math.IsInf(lr, 0) {
		return fmt.Errorf("lr: %v is not a positive number", j.LearningRate)
	}
	if err := j.OptimizerConfig().Validate(); err != nil {
		return fmt.Errorf("optimizer: %w", err)
	}
	orInt(&j.BatchSize, 64)
	if j.BatchSize < 1 || j.BatchSize > maxBatchSize {
		return fmt.Errorf("batch_size: %d is out of range: take 1 to %d", j.BatchSize, maxBatchSize)
	}
	orInt(&j.BatchesPerRound, 1)
	if j.BatchesPerRound < 1 || j.BatchesPerRound > maxBatchesPerRound {
		return fmt.Errorf("batches_per_round: %d is out of range: take 1 to %d", j.BatchesPerRound, maxBatchesPerRound)
	}
	orInt(&j.Rounds, 400)
	if j.Rounds < 1 || j.Rounds > maxRounds {
		return fmt.Errorf("rounds: %d is out of range: take 1 to %d", j.Rounds, maxRounds)
	}
	orInt(&j.Cooldown, j.Rounds/2)
	if j.Cooldown < -1 || j.Cooldown > j.Rounds {
		return fmt.Errorf("cooldown: %d is out of range: take 1 to the number of rounds, %d, or -1 for none", j.Cooldown, j.Rounds)
	}
	if !(j.TargetAccuracy >= 0 && j.TargetAccuracy <= 1) {
		return fmt.Errorf("target_accuracy: %v is no fraction: take 0 to 1 (0.97 for 97 %%)", j.TargetAccuracy)
	}
	orInt(&j.ValidateEvery, 25)
	if j.ValidateEvery < 1 {
		return fmt.Errorf("validate_every: %d is out of range: take 1 or more rounds", j.ValidateEvery)
	}
	orString(&j.Shards, shardsEpoch)
	if j.Shards != shardsEpoch && j.Shards != shardsFixed {
		return fmt.Errorf("shards: %.32q is unknown: take epoch or fixed", j.Shards)
	}
	orString(&j.Codec, codecFloat32)
	if j.Codec != codecFloat32 && j.Codec != codecFloat16 {
		return fmt.Errorf("codec: %.32q is unknown: take float32 or float16", j.Codec)
	}
	if j.Seed == 0 {
		j.Seed = 1
	}
	if j.Functions.Kind == functionsProcesses {
		j.Functions.Kind = "" // the default has one name, so that jobs keep theirs
	}
	if k := j.Functions.Kind; k != "" && k != functionsDatabase {
		return fmt.Errorf("functions.kind: %.32q is unknown: take %s or %s", k, functionsProcesses, functionsDatabase)
	}
	orInt(&j.Functions.Concurrency, 2)
	if c := j.Functions.Concurrency; c < 1 || c > 1024 {
		return fmt.Errorf("functions.concurrency: %d is out of range: take 1 to 1024", c)
	}
	orInt(&j.Functions.MemoryMB, 256)
	if m := j.Functions.MemoryMB; m < 32 || m > 10240 {
		return fmt.Errorf("functions.memory_mb: %d is out of range: take 32 to 10240", m)
	}
	if j.Functions.Timeout == 0 {
		j.Functions.Timeout = time.Minute
	}
	if t := j.Functions.Timeout; t < time.Second || t > 15*time.Minute {
		return fmt.Errorf("functions.timeout: %v is out of range: take 1s to 15m", t)
	}
	orInt(&j.CheckpointEvery, 50)
	if j.CheckpointEvery < 1 || j.CheckpointEvery > 1<<20 {
		return fmt.Errorf("checkpoint_every: %d is out of range: take 1 to %d rounds", j.CheckpointEvery, 1<<20)
	}
	if j.Patience < 0 || j.Patience > 1<<20 {
		return fmt.Errorf("patience: %d is out of range: take 1 to %d validations, or 0 for none", j.Patience, 1<<20)
	}
	if !(j.MinDelta >= 0 && j.MinDelta <= 1e6) {
		return fmt.Errorf("min_delta: %v is out of range: take 0 to 1000000, a difference of losses", j.MinDelta)
	}
	if j.MinDelta > 0 && j.Patience == 0 {
		return errors.New("min_delta: it says what counts as an improvement for patience, which is not set: set that too, or leave min_delta out")
	}
	if j.MaxTime != 0 && j.MaxTime < time.Second {
		return fmt.Errorf("max_time: %v is out of range: take 1s or more, such as 30m, or 0 for no limit", j.MaxTime)
	}
	if !(j.BudgetUSD >= 0 && j.BudgetUSD <= 1e6) {
		return fmt.Errorf("budget_usd: %v is out of range: take dollars up to 1000000, or 0 for no limit", j.BudgetUSD)
	}
	if !(j.Speed >= 0 && j.Speed < 1e9) {
		return fmt.Errorf("speed: %v is out of range: leave it out", j.Speed)
	}
	if j.PauseAfter < 0 || j.PauseAfter > 0 && j.PauseAfter < 3*j.CheckpointEvery {
		return fmt.Errorf("pause_after: %d is out of range: take 0 (never), or at least three checkpoints, %d rounds", j.PauseAfter, 3*j.CheckpointEvery)
	}
	return nil
}

// OptimizerConfig returns the optimizer of the job with its constants.
func (j *Job) OptimizerConfig() optim.Config {
	c := optim.Config{Name: j.Optimizer, LR: j.LearningRate}
	switch j.Optimizer {
	case "sgd":
		c.Momentum = 0.9
	case "adam":
		c.Beta1, c.Beta2, c.Eps = 0.9, 0.999, 1e-8
	}
	return c
}

// optimizerAt returns the optimizer for a round, 1 to Rounds. The learning
// rate is constant and then falls linearly (the schedule that Hägele et al.
// 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
// Durations", compare with a cosine); it has the same bits on every CPU.
func (j *Job) optimizerAt(round uint64) optim.Config {
	c := j.OptimizerConfig()
	if left := uint64(j.Rounds) - round + 1; j.Cooldown > 0 && left <= uint64(j.Cooldown) {
		c.LR = float32(float64(c.LR) * float64(left) / float64(j.Cooldown+1))
	}
	return c
}

// validationLag is how many rounds a validation has at most until its result
// is announced, so that no round waits for it.
const validationLag = 8

// validates reports whether the model of a round is validated, and in which
// round's announcements the result stands: before the next validation begins,
// and before the run ends.
func (j *Job) validates(model uint64) (announced uint64, ok bool) {
	every, rounds := uint64(j.ValidateEvery), uint64(j.Rounds)
	if model == 0 || model%every != 0 || model >= rounds {
		return 0, false
	}
	return min(model+min(validationLag, every), rounds), true
}

// validated returns the round whose model's validation stands in the
// announcements of a round: 0 if there is none.
func (j *Job) validated(announced uint64) (model uint64) {
	if announced == 0 {
		return 0
	}
	every := uint64(j.ValidateEvery)
	model = (announced - 1) / every * every // the last that may be complete
	if at, ok := j.validates(model); ok && at == announced {
		return model
	}
	return 0
}

// pending returns the round before another whose validation stands in
// announcements after that: 0 if there is none.
func (j *Job) pending(round uint64) (model uint64) {
	if round == 0 {
		return 0
	}
	every := uint64(j.ValidateEvery)
	model = (round - 1) / every * every
	if at, ok := j.validates(model); ok && at > round {
		return model
	}
	return 0
}

// open returns the model and the data set of a resolved job, checked against
// each other.
func (j *Job) open() (*nn.Model, *dataset.Dataset, error) {
	spec, err := nn.Builtin(j.Model)
	if err != nil {
		return nil, nil, fmt.Errorf("model: %w", err)
	}
	data, err := dataset.Open(j.Data)
	if err != nil {
		return nil, nil, fmt.Errorf("data: %w", err)
	}
	if err := data.Fits(spec.Input, spec.Classes); err != nil {
		return nil, nil, fmt.Errorf("data: the model %s: %w", spec.Name, err)
	}
	model, err := nn.New(spec)
	if err != nil {
		return nil, nil, fmt.Errorf("model: %w", err)
	}
	train, validation, _ := data.Split()
	if n := train.Len() / j.Peers; n < j.BatchSize {
		return nil, nil, fmt.Errorf("batch_size: a peer's shard has %d samples, fewer than one minibatch of %d: take fewer peers or a smaller batch", n, j.BatchSize)
	}
	if validation.Len() == 0 {
		return nil, nil, fmt.Errorf("data: %s has no samples left for validation", j.Data)
	}
	return model, data, nil
}

// maxJobFile bounds the size of a settings or roster file in bytes.
const maxJobFile = 1 << 20

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than the %d bytes it may have", path, limit)
	}
	return b, nil
}

// writeYAML writes v as YAML into a new file below a line of comment.
func writeYAML(path, comment string, v any, mode os.FileMode) error {
	b, err := yaml.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", path, err)
	}
	return writeFileAtomic(path, append([]byte("# "+comment+"\n"), b...), mode)
}

// writeFileAtomic replaces the file at path with b: a reader sees the old
// bytes or the new, also after a crash.
func writeFileAtomic(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(dirOf(path), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
		return fmt.Errorf("writing %s: %w", path, err)
	}
	// The new name is durable with its folder. Not every system can sync one,
	// but a disk that is full or broken says so everywhere.
	d, err := os.Open(dirOf(path))
	if err != nil {
		return nil // as on Windows
	}
	defer d.Close()
	if err := d.Sync(); errors.Is(err, syscall.EIO) || errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}

func orInt(v *int, def int) {
	if *v == 0 {
		*v = def
	}
}

func orString(v *string, def string) {
	if *v == "" {
		*v = def
	}
}
