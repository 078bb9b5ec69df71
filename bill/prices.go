package bill

// Default returns the prices of AWS Lambda on arm64 and of small machines for
// peers and databases in us-east-1.
func Default() *Table {
	return &Table{
		Name: "AWS us-east-1, arm64", Date: "2025-11-01", Source: "https://aws.amazon.com/lambda/pricing/ and https://aws.amazon.com/ec2/pricing/on-demand/",
		GBSecond: 13_333_400,     // $0.0000133334
		Request:  200_000,        // $0.20 a million
		PeerHour: 16_800_000_000, // t4g.small, $0.0168
		DBHour:   16_800_000_000,
		GBOut:    20_000_000_000, // between zones, $0.01 in each direction
	}
}
