"""Tables of facts and phrases from which `chat` writes its answers."""

from __future__ import annotations

# name, capital, continent, language, dish, sight
COUNTRIES = (
    ("France", "Paris", "Europe", "French", "onion soup with cheese", "the Eiffel Tower"),
    ("Germany", "Berlin", "Europe", "German", "bread with sausage", "the Brandenburg Gate"),
    ("Italy", "Rome", "Europe", "Italian", "pasta with tomato sauce", "the Colosseum"),
    ("Spain", "Madrid", "Europe", "Spanish", "rice with seafood", "the Alhambra in Granada"),
    ("Portugal", "Lisbon", "Europe", "Portuguese", "grilled fish", "the old trams of Lisbon"),
    ("Poland", "Warsaw", "Europe", "Polish", "filled dumplings", "the old town of Krakow"),
    ("Greece", "Athens", "Europe", "Greek", "salad with white cheese", "the Acropolis"),
    ("Norway", "Oslo", "Europe", "Norwegian", "salmon with potatoes", "the deep fjords"),
    ("Sweden", "Stockholm", "Europe", "Swedish", "meatballs with berries", "the old town of Stockholm"),
    ("Finland", "Helsinki", "Europe", "Finnish", "rye bread and fish soup", "the northern lights"),
    ("Austria", "Vienna", "Europe", "German", "apple cake", "the palaces of Vienna"),
    ("Ireland", "Dublin", "Europe", "English", "stew with potatoes", "the green cliffs by the sea"),
    ("Egypt", "Cairo", "Africa", "Arabic", "beans with bread", "the pyramids of Giza"),
    ("Morocco", "Rabat", "Africa", "Arabic", "couscous with vegetables", "the markets of Marrakesh"),
    ("Kenya", "Nairobi", "Africa", "Swahili and English", "corn porridge with greens", "the lions of the savanna"),
    ("Ghana", "Accra", "Africa", "English", "rice in tomato sauce", "the castles on the coast"),
    ("Japan", "Tokyo", "Asia", "Japanese", "rice with raw fish", "the temples of Kyoto"),
    ("China", "Beijing", "Asia", "Chinese", "noodles with vegetables", "the Great Wall"),
    ("India", "New Delhi", "Asia", "Hindi and English", "lentils with rice", "the Taj Mahal"),
    ("Thailand", "Bangkok", "Asia", "Thai", "fried noodles", "the golden temples"),
    ("Vietnam", "Hanoi", "Asia", "Vietnamese", "soup with rice noodles", "the islands of Ha Long Bay"),
    ("Turkey", "Ankara", "Europe and Asia", "Turkish", "grilled meat with bread", "the mosques of Istanbul"),
    ("Canada", "Ottawa", "North America", "English and French", "fries with cheese and gravy", "the Niagara Falls"),
    ("Mexico", "Mexico City", "North America", "Spanish", "corn bread with beans", "the old pyramids of Teotihuacan"),
    ("Cuba", "Havana", "North America", "Spanish", "rice with black beans", "the old cars of Havana"),
    ("Brazil", "Brasilia", "South America", "Portuguese", "black beans with rice", "the beaches of Rio"),
    ("Peru", "Lima", "South America", "Spanish", "fish with lemon", "the ruins of Machu Picchu"),
    ("Chile", "Santiago", "South America", "Spanish", "corn pie", "the mountains of the south"),
    ("Argentina", "Buenos Aires", "South America", "Spanish", "grilled beef", "the great waterfalls of Iguazu"),
    ("Australia", "Canberra", "Oceania", "English", "meat pie", "the opera house in Sydney"),
    ("New Zealand", "Wellington", "Oceania", "English", "roast lamb", "the hot springs and green hills"),
)

# name, kind, home, diet, fact
ANIMALS = (
    ("lion", "a large wild cat", "the grasslands of Africa", "meat", "A lion can sleep twenty hours a day."),
    ("tiger", "the largest wild cat", "the forests of Asia", "meat", "No two tigers have the same stripes."),
    ("elephant", "the largest animal on land", "Africa and Asia", "grass, leaves and fruit", "Elephants greet each other with their trunks."),
    ("giraffe", "the tallest animal in the world", "the savanna of Africa", "leaves from high trees", "A giraffe has as many bones in its neck as a human."),
    ("penguin", "a bird that swims but cannot fly", "the cold south", "fish", "Penguin fathers keep the eggs warm on their feet."),
    ("owl", "a bird that hunts at night", "forests and old barns", "mice and insects", "An owl can turn its head almost all the way around."),
    ("eagle", "a large bird of prey", "mountains and cliffs", "fish and small animals", "An eagle sees a rabbit from far away."),
    ("dolphin", "a clever animal of the sea", "warm oceans", "fish", "Dolphins call each other by whistles like names."),
    ("whale", "the largest animal on Earth", "all the oceans", "tiny sea animals", "Whales sing songs that travel for many miles."),
    ("shark", "a fish with strong teeth", "the open sea", "fish and seals", "Sharks lived before the first trees grew."),
    ("frog", "a small animal that lives in water and on land", "ponds and wet meadows", "flies and worms", "A frog drinks through its skin."),
    ("snake", "a long animal without legs", "deserts, forests and fields", "mice and eggs", "A snake smells with its tongue."),
    ("turtle", "an animal with a hard shell", "warm seas and rivers", "plants and small fish", "Some turtles live for more than a hundred years."),
    ("horse", "a strong animal that runs fast", "farms and wide plains", "grass and oats", "A horse can sleep while it stands."),
    ("cow", "a farm animal that gives milk", "farms and meadows", "grass and hay", "A cow chews its food twice."),
    ("fox", "a clever relative of the dog", "forests and even cities", "mice, birds and berries", "A fox can hear a mouse under the snow."),
    ("wolf", "a wild relative of the dog", "forests of the north", "deer and other animals", "Wolves live and hunt in families."),
    ("bear", "a big and strong animal with thick fur", "forests and mountains", "berries, fish and honey", "Bears sleep through most of the winter."),
    ("bee", "a small insect that makes honey", "hives and gardens", "nectar from flowers", "Bees dance to show where the flowers are."),
    ("ant", "a tiny insect that lives in large groups", "nests under the ground", "seeds and other insects", "An ant can carry many times its own weight."),
    ("butterfly", "an insect with colorful wings", "gardens and meadows", "nectar", "A butterfly tastes with its feet."),
    ("camel", "an animal with one or two humps", "hot deserts", "dry grass and thorny plants", "A camel can live for days without water."),
    ("kangaroo", "an animal that jumps on strong legs", "Australia", "grass and leaves", "A young kangaroo grows up in its mother's pouch."),
    ("squirrel", "a small animal with a bushy tail", "trees and parks", "nuts and seeds", "Squirrels forget many nuts, and new trees grow from them."),
)

# task, what you need, steps, hint
HOW_TO = (
    ("make a cup of tea", "water, a tea bag and a cup", ("Fill the kettle with fresh water.", "Bring the water to a boil.", "Put the tea bag into the cup.", "Pour the hot water over the tea bag.", "Wait three to five minutes.", "Take out the tea bag and enjoy your tea."), "Add a little honey or lemon if you like."),
    ("bake bread", "flour, water, salt and yeast", ("Mix the flour, the salt and the yeast.", "Add warm water and stir well.", "Knead the dough for ten minutes.", "Let the dough rest for one hour.", "Shape the dough into a loaf.", "Bake the loaf for forty minutes.", "Let the bread cool before you cut it."), "A bowl of water in the oven gives a better crust."),
    ("cook pasta", "a large pot, water, salt and pasta", ("Fill the pot with water and bring it to a boil.", "Add a spoon of salt.", "Put the pasta into the boiling water.", "Stir the pasta from time to time.", "Taste it after eight minutes.", "Pour off the water and serve the pasta with sauce."), "Keep a cup of the cooking water for the sauce."),
    ("plant tomatoes", "seeds, a pot, soil and a sunny place", ("Fill the pot with soil.", "Put two seeds into the soil.", "Cover the seeds with a thin layer of soil.", "Water the soil gently.", "Put the pot in a warm and sunny place.", "Tie the plant to a stick when it grows tall.", "Pick the tomatoes when they are red."), "Water the plants in the morning."),
    ("clean a window", "warm water, soap and a soft cloth", ("Remove the dust with a dry cloth.", "Mix warm water with a little soap.", "Wipe the glass from top to bottom.", "Rinse the glass with clean water.", "Dry the window with a soft cloth.", "Polish the corners last."), "Do not clean windows in bright sun, because they dry too fast."),
    ("learn a new language", "a good book, some time and a partner", ("Start with the most common words.", "Practice for twenty minutes every day.", "Listen to songs and simple stories.", "Speak with a partner as soon as you can.", "Write a few sentences each evening.", "Repeat old words once a week."), "Do not be afraid of mistakes."),
    ("change a bicycle tire", "a pump, tire levers and a new tube", ("Turn the bicycle upside down.", "Open the brake and remove the wheel.", "Use the levers to take off the tire.", "Pull out the old tube.", "Put a little air into the new tube and place it inside.", "Press the tire back onto the rim.", "Pump up the tire and put the wheel back."), "Check the tire for glass before you put in the new tube."),
    ("write a letter", "paper, a pen and an envelope", ("Write the date at the top.", "Begin with a friendly greeting.", "Say why you are writing.", "Tell the news in short paragraphs.", "End with good wishes and your name.", "Write the address on the envelope."), "Read the letter once more before you send it."),
    ("save money", "a notebook and a little patience", ("Write down what you spend in a month.", "Find out what you do not really need.", "Set a goal for each month.", "Put the money aside on the first day.", "Cook at home more often.", "Look at your notes every week."), "Start with a small amount."),
    ("train for a run", "good shoes and comfortable clothes", ("Begin with a short walk to warm up.", "Run slowly for ten minutes.", "Walk when you are out of breath.", "Add a few minutes each week.", "Rest for a day between two runs.", "Drink enough water.", "Stretch your legs at the end."), "Run with a friend and it is more fun."),
    ("pack a suitcase", "a suitcase, a list and your clothes", ("Make a list of what you need.", "Put heavy things at the bottom.", "Roll your clothes to save space.", "Put socks into your shoes.", "Keep liquids in a closed bag.", "Leave a little space for gifts."), "Put your name and phone number inside."),
    ("paint a wall", "paint, a roller, tape and a sheet", ("Cover the floor with the sheet.", "Put tape along the edges.", "Clean the wall and let it dry.", "Stir the paint well.", "Paint the corners with a small brush.", "Roll the paint onto the wall in wide lines.", "Let it dry and paint a second time."), "Open the windows while you work."),
    ("make pancakes", "flour, milk, eggs and butter", ("Mix the flour with the milk.", "Add the eggs and a little salt.", "Let the batter rest for ten minutes.", "Melt some butter in a hot pan.", "Pour a thin layer of batter into the pan.", "Turn the pancake when the edges are brown.", "Serve it with sugar or fruit."), "The first pancake is often not the best one."),
    ("wash wool clothes", "cold water and mild soap", ("Fill a bowl with cold water.", "Add a little mild soap.", "Put the clothes into the water.", "Move them gently for a few minutes.", "Rinse them with clean cold water.", "Press out the water without twisting.", "Lay them flat on a towel to dry."), "Never put wool into the dryer."),
    ("prepare for an exam", "your notes, a calendar and a quiet place", ("Find out what the exam is about.", "Make a plan for each day.", "Read your notes and mark what is important.", "Explain each topic in your own words.", "Solve old exercises.", "Take a short break every hour.", "Sleep well the night before."), "Learn with a friend and ask each other questions."),
    ("build a small campfire", "dry wood, small sticks and matches", ("Look for a safe place far from trees.", "Make a ring of stones.", "Put dry grass and small sticks in the middle.", "Light the grass with a match.", "Add larger pieces of wood slowly.", "Keep a bucket of water near the fire.", "Put out the fire before you leave."), "Check first whether fires are allowed."),
    ("take care of a cat", "food, water, a bed and a litter box", ("Give the cat fresh water every day.", "Feed it at the same time each day.", "Clean the litter box.", "Brush its fur once a week.", "Play with it in the evening.", "Visit the vet once a year."), "Let the cat come to you when it wants to."),
    ("make a salad", "lettuce, tomatoes, oil and lemon", ("Wash the lettuce and the tomatoes.", "Cut them into small pieces.", "Put everything into a large bowl.", "Mix oil, lemon juice and a little salt.", "Pour the sauce over the salad.", "Mix it well and serve it at once."), "Nuts and cheese go well with it."),
)

# goal, ideas
TIPS = (
    ("sleep better", ("Go to bed at the same time every night.", "Put your phone away an hour before bed.", "Keep the bedroom cool and dark.", "Do not drink coffee in the afternoon.", "Read a few pages of a book.", "Take a short walk in the evening.", "Drink a cup of warm milk or tea.", "Write down what is on your mind.")),
    ("eat more healthy food", ("Eat fruit for breakfast.", "Drink water instead of sweet drinks.", "Cook with fresh vegetables.", "Take smaller portions.", "Eat slowly and enjoy your food.", "Keep nuts at hand for small breaks.", "Plan your meals for the week.", "Do not shop when you are hungry.")),
    ("save energy at home", ("Turn off the lights when you leave a room.", "Wash your clothes in cold water.", "Dry your clothes in the air.", "Close the windows when the heating is on.", "Use lamps that need little power.", "Unplug devices that you do not use.", "Take short showers.", "Cook with a lid on the pot.")),
    ("learn faster", ("Study a little every day.", "Explain what you learned to a friend.", "Take short breaks.", "Test yourself with questions.", "Write a summary in your own words.", "Sleep enough.", "Turn off your phone while you study.", "Start with the hardest part.")),
    ("make new friends", ("Smile and say hello first.", "Join a club or a course.", "Ask people about their interests.", "Listen carefully.", "Invite someone for a coffee.", "Be yourself.", "Offer your help.", "Stay in touch after the first meeting.")),
    ("feel less stress", ("Breathe slowly for a minute.", "Go for a walk in the park.", "Make a list and do one thing at a time.", "Talk to a good friend.", "Listen to calm music.", "Say no when it is too much.", "Take a break without your phone.", "Do some sport twice a week.")),
    ("keep a room tidy", ("Give every thing its place.", "Put things back right after you use them.", "Make your bed in the morning.", "Clean for ten minutes each day.", "Give away what you do not need.", "Use boxes for small things.", "Open the window every day.", "Hang up your clothes.")),
    ("work from home", ("Start at the same time every day.", "Get dressed as if you went out.", "Find a quiet place to work.", "Take a real lunch break.", "Write down your goals in the morning.", "Go outside at least once a day.", "Talk to your colleagues.", "Stop work at a fixed time.")),
    ("grow plants on a balcony", ("Choose plants that fit the light.", "Use large pots with holes.", "Water them early in the morning.", "Grow herbs near the kitchen.", "Add fresh soil in spring.", "Remove dry leaves.", "Protect the plants from strong wind.", "Ask a neighbor to water them when you travel.")),
    ("write well", ("Use short sentences.", "Choose simple words.", "Read your text aloud.", "Cut what you do not need.", "Write every day.", "Begin with the main point.", "Ask a friend to read it.", "Take a break before you correct it.")),
    ("travel with little money", ("Travel outside the holidays.", "Take the bus or the train.", "Cook your own meals.", "Stay with friends or in a hostel.", "Visit parks and free museums.", "Book early.", "Walk as much as you can.", "Carry your own bottle of water.")),
    ("stay active", ("Take the stairs.", "Walk to the shop.", "Ride a bicycle to work.", "Stand up once every hour.", "Dance to your favorite music.", "Play with children or a dog.", "Do five minutes of exercise in the morning.", "Swim once a week.")),
)

# name, what it is, advantage, purpose
THINGS = (
    ("bicycle", "light and quiet", "needs no fuel", "stay fit"),
    ("car", "fast and comfortable", "carries a lot", "travel far with a family"),
    ("train", "large and fast", "lets you read on the way", "cross the country"),
    ("bus", "cheap and easy to find", "takes many people at once", "get around in the city"),
    ("book", "made of paper", "needs no power", "read for a long time"),
    ("tablet", "small and bright", "holds many books", "read on a journey"),
    ("laptop", "light and easy to carry", "works everywhere", "write on the road"),
    ("desktop computer", "large and powerful", "is easy to repair", "work at one place"),
    ("cat", "calm and independent", "can stay at home alone", "have a quiet friend"),
    ("dog", "loyal and active", "loves to go for walks", "be outside every day"),
    ("tent", "light and cheap", "brings you close to nature", "sleep under the stars"),
    ("hotel", "comfortable and warm", "has a soft bed and breakfast", "rest after a long day"),
    ("piano", "large and rich in sound", "lets you play many notes at once", "play music at home"),
    ("guitar", "small and easy to carry", "sounds good with songs", "play with friends"),
    ("garden", "green and quiet", "gives you fresh vegetables", "grow your own food"),
    ("balcony", "small and sunny", "needs little work", "grow a few herbs"),
)

PLACES = ("in the mountains", "at the sea", "in a big city", "at a lake", "in the countryside")
SEASONS = ("spring", "summer", "autumn", "winter")
MORNING = {
    "in the mountains": ("climb a small hill", "walk to the old mill", "take the cable car to the top", "look for wild flowers"),
    "at the sea": ("walk along the beach", "collect shells", "watch the fishing boats", "visit the lighthouse"),
    "in a big city": ("visit a museum", "take a tour through the old town", "see the market", "climb a tower and enjoy the view"),
    "at a lake": ("rent a boat", "walk around the lake", "watch the birds", "ride a bicycle along the shore"),
    "in the countryside": ("visit a farm", "walk through the fields", "pick berries", "ride a horse"),
}
NOON = ("have lunch in a small restaurant", "eat a picnic under a tree", "try the local soup", "rest in the shade", "buy bread and cheese at a shop")
EVENING = ("watch the sunset", "play cards with friends", "listen to live music", "cook dinner together", "look at the stars", "go to bed early")
PACKING = {
    "spring": ("a rain jacket", "a warm sweater", "good shoes", "an umbrella"),
    "summer": ("sun cream", "a hat", "a bottle of water", "swimming clothes"),
    "autumn": ("a warm sweater", "an umbrella", "good boots", "a thermos with tea"),
    "winter": ("warm gloves", "a thick coat", "a wool hat", "good boots"),
}

HERO_NAMES = ("Mia", "Leo", "Nora", "Oskar", "Luna", "Max", "Ella", "Paul", "Rosa", "Finn", "Ida", "Theo")
HEROES = ("fox", "rabbit", "bear", "mouse", "farmer", "sailor", "painter", "baker", "owl", "turtle", "robot", "shepherd")
STORY_PLACES = ("in a deep forest", "by the sea", "on a high mountain", "in a small village", "at the edge of a great desert", "in an old tower")
STORY_THINGS = ("golden key", "red balloon", "silver bell", "magic lamp", "warm coat", "blue stone", "little boat", "lost map", "singing flower")

# subject, reasons
WHY = (
    ("the sky is blue", ("Sunlight is made of many colors.", "When it meets the air, the blue part is scattered more than the others.", "So blue light reaches our eyes from every side, and the sky looks blue.")),
    ("leaves change color in autumn", ("In summer, leaves are full of a green substance that catches light.", "When the days get short, the tree takes it back.", "Then the yellow and red colors that were there before become visible.")),
    ("we need sleep", ("While we sleep, the body rests and repairs itself.", "The brain sorts what we learned during the day.", "Without sleep we become slow and forget things.")),
    ("ice floats on water", ("When water freezes, it takes more space.", "So ice is lighter than the same amount of water.", "That is why it stays on top.")),
    ("the moon changes its shape", ("The moon does not really change.", "The sun always lights one half of it.", "While the moon moves around the Earth, we see more or less of the bright half.")),
    ("it rains", ("The sun warms the sea, and water rises into the air.", "High above, it cools down and becomes small drops in a cloud.", "When the drops are too heavy, they fall as rain.")),
    ("the sea is salty", ("Rain washes salt out of the rocks.", "Rivers carry it to the sea.", "The water rises into the air again, but the salt stays.")),
    ("birds fly south in winter", ("In winter, the north is cold and there is little food.", "The south is warm and has many insects.", "In spring the birds come back to build their nests.")),
    ("we have seasons", ("The Earth is a little tilted.", "While it moves around the sun, one half gets more light and then the other.", "More light means summer, less light means winter.")),
    ("plants need light", ("Plants make their food from air and water.", "For this work they need energy.", "They take it from the light of the sun.")),
    ("bread gets hard", ("Fresh bread holds a lot of water.", "With time the water leaves the bread.", "The crumb then becomes dry and hard.")),
    ("the wind blows", ("The sun warms some places more than others.", "Warm air rises, and cool air flows in to take its place.", "This moving air is the wind.")),
)

# to whom, reason, text
MESSAGES = (
    ("a friend", "plan a birthday party", "My birthday is on Saturday, and I would like to invite you to a small party at my house. We start at six and there will be cake."),
    ("a neighbor", "ask for help with the plants", "I will be away for two weeks in July. Could you please water my plants every second day? The key is with the baker."),
    ("a teacher", "ask for more time", "I was ill last week and could not finish my homework. May I hand it in on Monday instead of Friday?"),
    ("a landlord", "report a broken heater", "The heater in the living room has not worked since Tuesday, and it is getting cold. Could you send someone to repair it this week?"),
    ("a colleague", "move a meeting", "I cannot come to our meeting on Thursday because I have to see the doctor. Could we meet on Friday at ten instead?"),
    ("a customer", "say sorry for a delay", "Your order will arrive two days late because of the bad weather. We are sorry for the delay and will send you a small gift."),
    ("a grandmother", "say thank you for a gift", "Thank you so much for the warm scarf. I wear it every day, and all my friends ask where they can buy one."),
    ("a coach", "cancel the training", "I hurt my foot on Sunday, so I cannot come to the training this week. The doctor says that it will be fine in ten days."),
    ("a librarian", "ask about a lost book", "I am afraid that I lost the book about birds that I borrowed in May. How much do I have to pay for a new one?"),
    ("a cousin", "ask for a recipe", "The soup that you made last weekend was the best I ever had. Could you send me the recipe? I want to cook it for my family."),
)
