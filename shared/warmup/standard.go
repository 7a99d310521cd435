package warmup

// Standard returns the plan that Relais ships, for an address or a domain. Where
// providers publish nothing the figures are a cautious choice of ours. The targets
// add up to 3.5 million a day, about what one warm address is good for.
func Standard() Plan {
	grow := func(first, later int64) []Growth {
		return []Growth{{From: 15, To: 21, Percent: first}, {From: 22, Percent: later}}
	}
	small := []int64{50, 100, 200, 400, 700, 1200, 2000, 3000, 4500, 6000, 8000, 11_000, 14_500, 18_000}
	return Plan{
		Name:     "standard",
		Overflow: OverflowWarm,
		Tracks: []Track{
			{"google", []int64{200, 500, 1000, 2000, 4000, 7000, 10_000, 15_000, 20_000, 30_000, 45_000, 60_000, 80_000, 100_000}, grow(25, 20), 1_000_000},
			{"microsoft-consumer", []int64{100, 200, 400, 800, 1500, 3000, 5000, 8000, 12_000, 18_000, 25_000, 35_000, 45_000, 60_000}, grow(20, 15), 500_000},
			{"yahoo", []int64{150, 300, 600, 1200, 2500, 5000, 8000, 12_000, 18_000, 25_000, 35_000, 50_000, 65_000, 80_000}, grow(25, 20), 600_000},
			{"apple", []int64{50, 100, 200, 400, 800, 1500, 2500, 4000, 6000, 9000, 12_000, 17_000, 23_000, 30_000}, grow(20, 15), 250_000},
			{"orange", []int64{100, 200, 400, 800, 1500, 2500, 4000, 6000, 9000, 13_000, 18_000, 24_000, 32_000, 40_000}, grow(20, 15), 400_000},
			{"laposte", small, grow(15, 10), 100_000},
			{"sfr", small, grow(15, 10), 100_000},
			{"free", small, grow(15, 10), 100_000},
			{"bouygues", small, grow(15, 10), 100_000},
			{"gmx", small, grow(15, 10), 150_000},
			{OtherClass, []int64{50, 100, 200, 400, 700, 1500, 2500, 4000, 6000, 9000, 12_000, 16_000, 20_000, 25_000}, grow(20, 15), 200_000},
		},
		Gate: Gate{
			MinSample: 50, MinUsed: 700, MinAccepted: 900, MaxDeferred: 200, MaxBlocked: 10, MaxHard: 20,
			MaxComplaints: 1, BadComplaints: 3,
			BlockStages: 1, BadStages: 2, PauseDays: 1,
			SilentDays: 10, SilentStages: 3, RestartDays: 30, RestartPart: 250,
		},
	}
}
