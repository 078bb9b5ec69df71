package round

// Mutants lists safety rules that can be switched off in tests.
func Mutants() []string {
	return []string{"threshold", "watermark", "persist", "believe", "unheld", "repeat", "forget",
		"quorum", "vote twice", "forget votes", "blind fork", "keep guilty", "vote at once"}
}

// NewMutant returns a constructor of machines without the named rule.
func NewMutant(name string) func(Config) (*Machine, error) {
	return func(cfg Config) (*Machine, error) {
		m, err := New(cfg)
		if err != nil {
			return nil, err
		}
		switch name {
		case "threshold":
			m.mutant.lowThreshold = MaxPeers
		case "watermark":
			m.mutant.ignoreWatermark = true
		case "persist":
			m.mutant.noPersist = true
		case "believe":
			m.mutant.believe = true
		case "unheld":
			m.mutant.ballotUnheld = true
		case "repeat":
			m.mutant.repeatSlot = true
		case "forget":
			m.mutant.holdAll = true
		case "quorum":
			m.mutant.lowQuorum = 1
		case "vote twice":
			m.mutant.voteTwice = true
		case "forget votes":
			m.voted = Record{}
		case "vote at once":
			m.mutant.forgetVotes = true
		case "blind fork":
			m.mutant.blindFork = true
		case "keep guilty":
			m.mutant.keepGuilty = true
		default:
			panic("no mutant " + name)
		}
		return m, nil
	}
}
